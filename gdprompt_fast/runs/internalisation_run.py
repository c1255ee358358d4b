"""``gdprompt internalisation``: the experiments on what is internalised, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import option
from ..errors import UserError
from ..internalisation import EXPERIMENTS, Preset, contexts
from ..internalisation.preset import SEEDS
from ..internalisation.run import check_experiment, run_experiment
from .command import command
from .groups import WeightsConfig
from .papers import (
    PaperConfig,
    chosen,
    done_in_turn,
    name_field,
    output_for,
    preset_field,
    sizes_of,
)

OWN_PRESETS = ("small", "paper")
FILES = {"people": "file", "triples": "file", "mnist": "folder"}  # by section, the key


@dataclass(frozen=True, kw_only=True)
class InternalisationConfig(WeightsConfig, PaperConfig):
    """Which experiment, at which sizes, and where."""

    command = "internalisation"

    name: str = name_field(EXPERIMENTS)
    preset: str = preset_field(OWN_PRESETS)
    files: tuple[str, ...] | None = option(
        None, f"NAME=PATH: where the tables and the digits are; names: {', '.join(FILES)}"
    )

    def read_preset(self) -> Preset:
        """The preset, with what this configuration says over it.

        Raises:
            UserError: naming the preset's section, what was expected and what was given.
        """
        sections = dict(preset_sizes(self.preset) if self.sizes is None else self.sizes)
        for file in self.files or ():
            sections = _with_file(sections, file)
        dropped = [SEEDS] if self.seeds is not None else []
        dropped += ["models", "pretrained"] if self.model is not None else []
        sections = {name: _without(section, dropped) for name, section in sections.items()}
        return Preset.read(self.over_the_model(sections))


def preset_sizes(name_or_path: str) -> dict[str, Any]:
    """The sections ``[internalisation.sizes.…]`` of a preset's file, or all of the file.

    Raises:
        UserError: if there is no such preset, or it is not TOML.
    """
    return sizes_of(name_or_path, OWN_PRESETS, "internalisation", "internalisation")


def _without(section: Any, keys: Sequence[str]) -> Any:
    if not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if key not in keys}


def _with_file(sections: dict[str, Any], given: str) -> dict[str, Any]:
    name, _, path = given.partition("=")
    if name not in FILES or not path or not isinstance(sections.get(name), dict):
        known = [each for each in FILES if isinstance(sections.get(each), dict)]
        raise UserError(f"files: expected NAME=PATH with a name of {known}, got {given!r}")
    return sections | {name: sections[name] | {FILES[name]: path}}


@command(
    "Experiments of the paper on weak and strong internalisation: JSON, a Markdown table, what it "
    "shows and does not show, and a figure. Stages that --output holds already are not done again.",
    continued_by="the same command continues it",
)
def internalisation(config: InternalisationConfig) -> Callable[[], Path]:
    """Checks preset and data; the work is what is left to do, and returns the Markdown file."""
    preset = config.read_preset()
    names = chosen(config.name, EXPERIMENTS, preset.sections)
    with output_for(config, names):
        for name in names:
            check_experiment(name, preset)
        device, missing = config.torch_device, config.allow_missing
        repetitions = contexts(preset, config.output, device, missing)
    return lambda: done_in_turn(names, lambda name: run_experiment(name, repetitions))
