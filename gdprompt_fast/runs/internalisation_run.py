"""``gdprompt internalisation``: the experiments on what is internalised, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts.files import is_empty, write_folder
from ..config.fields import REQUIRED, WritingConfig, option
from ..config.presets import load_preset
from ..errors import UserError
from ..internalisation import EXPERIMENTS, Preset, contexts
from ..internalisation.preset import SEEDS
from ..internalisation.run import check_experiment, run_experiment
from ..report.repetition import STAGES
from ..report.write import is_experiment
from .command import command, outputs_of
from .groups import REPLACES_FOLDER, DeviceConfig, WeightsConfig, overwrite_field

OWN_PRESETS = ("small", "paper")
ALL = "all"
FILES = {"people": "file", "triples": "file", "mnist": "folder"}  # by section, the key


@dataclass(frozen=True, kw_only=True)
class InternalisationConfig(WeightsConfig, DeviceConfig, WritingConfig):
    """Which experiment, at which sizes, and where."""

    command = "internalisation"

    name: str = option(
        REQUIRED, "which one, or all of the preset's", (*EXPERIMENTS, ALL), positional=True
    )
    preset: str = option(
        "small", f"sizes and rates: {', '.join(OWN_PRESETS)} or a TOML file", reads=True
    )
    sizes: dict[str, Any] | None = option(
        None, "sizes and rates by section; None: the preset's", on_command_line=False
    )
    output: Path = option(REQUIRED, "folder of results and stages", writes=True)
    seeds: tuple[int, ...] | None = option(None, "repetitions; None: the preset's")
    model: str | None = option(
        None, "model folder or name on the hub, of all; None: the preset's", reads=True
    )
    files: tuple[str, ...] | None = option(
        None, f"NAME=PATH: where the tables and the digits are; names: {', '.join(FILES)}"
    )
    overwrite: bool = overwrite_field(
        f"{REPLACES_FOLDER}, unless it is one of experiments, which is gone on with"
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
        general = dict(sections.get("model") or {})
        if self.model is not None:
            general.pop("revision", None)  # of the preset's own model
        seeds = None if self.seeds is None else list(self.seeds)
        over = {"seeds": seeds, "name": self.model, "revision": self.revision}
        given = {key: value for key, value in over.items() if value is not None}
        return Preset.read({**sections, "model": general | given})


def preset_sizes(name_or_path: str) -> dict[str, Any]:
    """The sections ``[internalisation.sizes.…]`` of a preset's file, or all of the file.

    Raises:
        UserError: if there is no such preset, or it is not TOML.
    """
    own = name_or_path in OWN_PRESETS
    sections = load_preset(f"internalisation-{name_or_path}" if own else name_or_path)
    within = sections.get("internalisation", {})
    sizes = within.get("sizes") if isinstance(within, dict) else None
    return sections if sizes is None else dict(sizes)


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


def names_of(name: str, preset: Preset) -> list[str]:
    """The experiments that are asked for.

    Raises:
        UserError: if the preset has none.
    """
    names = [name] if name != ALL else [each for each in EXPERIMENTS if each in preset.sections]
    if not names:
        raise UserError(f"preset: expected sections of {list(EXPERIMENTS)}, got none")
    return names


@command(
    "Experiments of the paper on weak and strong internalisation: JSON, a Markdown table, what it "
    "shows and does not show, and a figure. Stages that --output holds already are not done again.",
    continued_by="the same command continues it",
)
def internalisation(config: InternalisationConfig) -> Callable[[], Path]:
    """Checks preset and data; the work is what is left to do, and returns the Markdown file."""
    output, outputs = config.output, outputs_of(config)
    preset = config.read_preset()
    names = names_of(config.name, preset)
    foreign = not (output / STAGES).is_dir() and not is_empty(output)
    if foreign:
        outputs.check_folder(output)
    else:
        own = (f"{name}{suffix}" for name in names for suffix in (".json", ".md", ".png"))
        for file in (output / each for each in own):
            if file.exists():
                outputs.check_file(file.name, file, is_experiment)
    for name in names:
        check_experiment(name, preset)
    repetitions = contexts(preset, output, config.torch_device, config.allow_missing)
    if foreign:
        write_folder(output, lambda folder: (folder / STAGES).mkdir())

    def work() -> Path:
        for name in names:
            markdown = run_experiment(name, repetitions)
            print(f"\n{markdown.read_text(encoding='utf-8')}\nwritten to {markdown.parent}")
        return markdown

    return work
