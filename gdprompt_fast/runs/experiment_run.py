"""``gdprompt experiment``: one of the paper's experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import check_counts, option
from ..errors import UserError
from ..experiments import EXPERIMENTS, Preset, experiment_contexts
from ..experiments.cost import describe_cost
from ..experiments.parallel import finished_one_by_one
from ..experiments.preset import SEEDS
from ..experiments.run import run_experiment
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

OWN_PRESETS = ("small", "smollm2-cpu", "smollm2-gpu", "smollm2-second-order", "paper")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(WeightsConfig, PaperConfig):
    """Which experiment, at which sizes, and where."""

    command = "experiment"

    name: str = name_field(EXPERIMENTS)
    preset: str = preset_field(OWN_PRESETS)
    files: tuple[str, ...] | None = option(
        None,
        "TASK=FILE or TASK=FILE,TEST_FILE: tasks whose examples are read there, not from the hub",
    )
    jobs: int = option(1, "processes at once, which share the device")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "jobs")

    def read_preset(self) -> Preset:
        """The preset, with what this configuration says over it.

        Raises:
            UserError: naming the preset's section, what was expected and what was given.
        """
        sections = dict(preset_sizes(self.preset) if self.sizes is None else self.sizes)
        if self.files is not None:
            sections["tasks"] = with_files(sections.get("tasks"), self.files)
        if self.seeds is not None:
            sections = {name: without_seeds(section) for name, section in sections.items()}
        return Preset.read(self.over_the_model(sections))


def without_seeds(section: Any) -> Any:
    """A section of an experiment without its own choice of seeds."""
    if not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if key != SEEDS}


def with_files(tasks: Any, files: Sequence[str]) -> dict[str, Any]:
    """The sections of tasks with the files that were given for them.

    Raises:
        UserError: if one is not TASK=FILE, or there is no such task.
    """
    changed = dict(tasks) if isinstance(tasks, dict) else {}
    for given in files:
        name, _, paths = given.partition("=")
        file, _, test_file = paths.partition(",")
        if name not in changed or not file:
            raise UserError(
                f"files: expected TASK=FILE with a task of {', '.join(changed)}, got {given!r}"
            )
        changed[name] = {**changed[name], "file": file}
        if test_file:
            changed[name]["test_file"] = test_file
    return changed


def preset_sizes(name_or_path: str) -> dict[str, Any]:
    """The sizes and rates of a preset, ``[experiment.sizes.…]`` in its file, or all of the file.

    Raises:
        UserError: if there is no such preset, or it is not TOML.
    """
    return sizes_of(name_or_path, OWN_PRESETS, "experiments", "experiment")


@command(
    "One of the paper's experiments: JSON, a Markdown table beside the paper's numbers and a "
    "figure. Stages that --output holds already, of any experiment, are not done again.",
    continued_by="the same command continues it",
)
def experiment(config: ExperimentConfig) -> Callable[[], Path]:
    """Checks preset and model; the work is what is left to do, and returns the Markdown file."""
    preset = config.read_preset()
    names = chosen(config.name, EXPERIMENTS, preset.sections)
    with output_for(config, names):
        for name in names:
            its = EXPERIMENTS[name]
            its.check(preset, preset.section(name, its.options))
            preset.seeds_of(name)
        device, missing = config.torch_device, config.allow_missing
        repetitions = experiment_contexts(preset, config.output, device, missing)

    def work() -> Path:
        print(f"{describe_cost(names, repetitions)}\n")
        in_order = (
            names if config.jobs == 1 else finished_one_by_one(names, repetitions, config.jobs)
        )
        return done_in_turn(in_order, lambda name: run_experiment(name, repetitions))

    return work
