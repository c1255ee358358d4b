"""``gdprompt icl``: in-context learning against fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts.files import is_empty, write_folder
from ..config.fields import REQUIRED, WritingConfig, option
from ..config.presets import load_preset
from ..errors import UserError
from ..icl.context import icl_contexts
from ..icl.preset import Preset
from ..icl.run import EXPERIMENTS, FILES, run_icl
from ..report.repetition import STAGES
from ..report.write import is_experiment
from .command import command, outputs_of
from .experiment_run import ALL, with_files
from .groups import REPLACES_FOLDER, DeviceConfig, overwrite_field, revision_field

OWN_PRESETS = ("small", "paper")


@dataclass(frozen=True, kw_only=True)
class IclConfig(DeviceConfig, WritingConfig):
    """Which experiment, at which sizes, and where."""

    command = "icl"

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
    revision: str | None = revision_field()
    files: tuple[str, ...] | None = option(
        None,
        "TASK=FILE or TASK=FILE,TEST_FILE: tasks that are read there, not from the hub",
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
        general = dict(sections.get("model", {}))
        if self.files is not None:
            sections["tasks"] = with_files(sections.get("tasks"), self.files)
        if self.model is not None:
            general.pop("revision", None)  # of the preset's own model
        seeds = None if self.seeds is None else list(self.seeds)
        over = {"seeds": seeds, "name": self.model, "revision": self.revision}
        given = {key: value for key, value in over.items() if value is not None}
        return Preset.read({**sections, "model": general | given})


def preset_sizes(name_or_path: str) -> dict[str, Any]:
    """The sizes and rates of a preset: ``[icl.sizes.…]`` in its file, or all of the file.

    Raises:
        UserError: if there is no such preset, or it is not TOML.
    """
    own = name_or_path in OWN_PRESETS
    sections = load_preset(f"icl-{name_or_path}" if own else name_or_path)
    if "icl" not in sections:
        return sections
    section = sections["icl"]
    sizes = section.get("sizes") if isinstance(section, dict) else None
    if not isinstance(sizes, dict):
        raise UserError(f"preset: expected sections [icl.sizes.…] in {name_or_path}, got none")
    return sizes


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
    output, outputs = config.output, outputs_of(config)
    preset = config.read_preset()
    names = [config.name]
    if config.name == ALL:
        names = [each for each in EXPERIMENTS if each in preset.sections]
    foreign = not (output / STAGES).is_dir() and not is_empty(output)
    if foreign:
        outputs.check_folder(output)
    else:
        own = (f"{FILES}{name}{end}" for name in names for end in (".json", ".md", ".png"))
        for file in (output / each for each in own):
            if file.exists():
                outputs.check_file(file.name, file, is_experiment)
    repetitions = icl_contexts(preset, output, config.torch_device)
    for name in names:
        its = EXPERIMENTS[name]
        its.check(repetitions, preset.section(name, its.options))
    if foreign:
        write_folder(output, lambda folder: (folder / STAGES).mkdir())

    def work() -> Path:
        for name in names:
            markdown = run_icl(name, repetitions)
            print(f"\n{markdown.read_text(encoding='utf-8')}\nwritten to {markdown.parent}")
        return markdown

    return work
