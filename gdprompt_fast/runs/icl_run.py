"""``gdprompt icl``: in-context learning against fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import option
from ..icl.context import icl_contexts
from ..icl.preset import Preset
from ..icl.run import EXPERIMENTS, FILES, run_icl
from .command import command
from .experiment_run import with_files
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


@dataclass(frozen=True, kw_only=True)
class IclConfig(PaperConfig):
    """Which experiment, at which sizes, and where."""

    command = "icl"

    name: str = name_field(EXPERIMENTS)
    preset: str = preset_field(OWN_PRESETS)
    files: tuple[str, ...] | None = option(
        None,
        "TASK=FILE or TASK=FILE,TEST_FILE: tasks that are read there, not from the hub",
    )

    def read_preset(self) -> Preset:
        """The preset, with what this configuration says over it.

        Raises:
            UserError: naming the preset's section, what was expected and what was given.
        """
        sections = dict(preset_sizes(self.preset) if self.sizes is None else self.sizes)
        if self.files is not None:
            sections["tasks"] = with_files(sections.get("tasks"), self.files)
        return Preset.read(self.over_the_model(sections))


def preset_sizes(name_or_path: str) -> dict[str, Any]:
    """The sizes and rates of a preset: ``[icl.sizes.…]`` in its file, or all of the file.

    Raises:
        UserError: if there is no such preset, or it is not TOML.
    """
    return sizes_of(name_or_path, OWN_PRESETS, "icl", "icl")


@command(
    "How alike are in-context learning and fine-tuning? One of the experiments: JSON, a Markdown "
    "table beside the paper's numbers and a figure. Stages that --output holds already are not "
    "done again.",
    continued_by="the same command continues it",
)
def icl(config: IclConfig) -> Callable[[], Path]:
    """Checks preset, model and tasks; the work is what is left to do, and returns the Markdown
    file.
    """
    preset = config.read_preset()
    names = chosen(config.name, EXPERIMENTS, preset.sections)
    with output_for(config, [f"{FILES}{name}" for name in names]):
        repetitions = icl_contexts(preset, config.output, config.torch_device)
        for name in names:
            its = EXPERIMENTS[name]
            its.check(repetitions, preset.section(name, its.options))
    return lambda: done_in_turn(names, lambda name: run_icl(name, repetitions))
