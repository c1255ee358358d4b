"""``gdprompt experiment``: one of the paper's experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts.files import is_empty, write_folder
from ..config.fields import REQUIRED, WritingConfig, check_counts, option
from ..config.presets import load_preset
from ..errors import UserError
from ..experiments import EXPERIMENTS, Preset, experiment_contexts
from ..experiments.cost import describe_cost
from ..experiments.parallel import finished_one_by_one
from ..experiments.preset import SEEDS
from ..experiments.run import run_experiment
from ..report.repetition import STAGES
from ..report.write import is_experiment
from .command import command, outputs_of
from .groups import REPLACES_FOLDER, DeviceConfig, WeightsConfig, overwrite_field

OWN_PRESETS = ("small", "smollm2-cpu", "smollm2-gpu", "smollm2-second-order", "paper")
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(WeightsConfig, DeviceConfig, WritingConfig):
    """Which experiment, at which sizes, and where."""

    command = "experiment"

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
        None, "model folder or name on the hub; None: the preset's", reads=True
    )
    files: tuple[str, ...] | None = option(
        None,
        "TASK=FILE or TASK=FILE,TEST_FILE: tasks whose examples are read there, not from the hub",
    )
    jobs: int = option(1, "processes at once, which share the device")
    overwrite: bool = overwrite_field(
        f"{REPLACES_FOLDER}, unless it is one of experiments, which is gone on with"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "jobs")

    def read_preset(self) -> Preset:
        """The preset, with what this configuration says over it.

        Raises:
            UserError: naming the preset's section, what was expected and what was given.
        """
        sections = dict(preset_sizes(self.preset) if self.sizes is None else self.sizes)
        general = dict(sections.get("model", {}))
        if self.files is not None:
            sections["tasks"] = with_files(sections.get("tasks"), self.files)
        if self.seeds is not None:
            sections = {name: without_seeds(section) for name, section in sections.items()}
        if self.model is not None:
            general.pop("revision", None)  # of the preset's own model
        seeds = None if self.seeds is None else list(self.seeds)
        over = {"seeds": seeds, "name": self.model, "revision": self.revision}
        given = {key: value for key, value in over.items() if value is not None}
        return Preset.read({**sections, "model": general | given})


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


def names_of(name: str, preset: Preset) -> list[str]:
    """The experiments that are asked for."""
    return [name] if name != ALL else [each for each in EXPERIMENTS if each in preset.sections]


def preset_sizes(name_or_path: str) -> dict[str, Any]:
    """The sizes and rates of a preset, ``[experiment.sizes.…]`` in its file, or all of the file.

    Raises:
        UserError: if there is no such preset, or it is not TOML.
    """
    own = name_or_path in OWN_PRESETS
    sections = load_preset(f"experiments-{name_or_path}" if own else name_or_path)
    if "experiment" not in sections:
        return sections
    section = sections["experiment"]
    sizes = section.get("sizes") if isinstance(section, dict) else None
    if not isinstance(sizes, dict):
        raise UserError(
            f"preset: expected sections [experiment.sizes.…] in {name_or_path}, got none"
        )
    return sizes


@command(
    "One of the paper's experiments: JSON, a Markdown table beside the paper's numbers and a "
    "figure. Stages that --output holds already, of any experiment, are not done again.",
    continued_by="the same command continues it",
)
def experiment(config: ExperimentConfig) -> Callable[[], Path]:
    """Checks preset and model; the work is what is left to do, and returns the Markdown file."""
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
        its = EXPERIMENTS[name]
        its.check(preset, preset.section(name, its.options))
        preset.seeds_of(name)
    repetitions = experiment_contexts(preset, output, config.torch_device, config.allow_missing)
    if foreign:
        write_folder(output, lambda folder: (folder / STAGES).mkdir())

    def work() -> Path:
        print(f"{describe_cost(names, repetitions)}\n")
        in_order = (
            names if config.jobs == 1 else finished_one_by_one(names, repetitions, config.jobs)
        )
        for name in in_order:
            markdown = run_experiment(name, repetitions)
            print(f"\n{markdown.read_text(encoding='utf-8')}\nwritten to {markdown.parent}")
        return markdown

    return work
