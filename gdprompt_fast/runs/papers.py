"""What the commands that do a paper's experiments have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts.files import is_empty, write_folder
from ..config.fields import REQUIRED, WritingConfig, option
from ..config.presets import load_preset
from ..errors import UserError
from ..report.repetition import STAGES
from ..report.write import is_experiment
from .command import outputs_of
from .groups import REPLACES_FOLDER, DeviceConfig, overwrite_field, revision_field

ALL = "all"


def name_field(experiments: Iterable[str]) -> Any:
    """Of ``name``."""
    return option(
        REQUIRED, "which one, or all of the preset's", (*experiments, ALL), positional=True
    )


def preset_field(own: Iterable[str]) -> Any:
    """Of ``preset``."""
    return option("small", f"sizes and rates: {', '.join(own)} or a TOML file", reads=True)


@dataclass(frozen=True, kw_only=True)
class PaperConfig(DeviceConfig, WritingConfig):
    """Which experiment, at which sizes, and where."""

    name: str = name_field(())
    preset: str = preset_field(())
    sizes: dict[str, Any] | None = option(
        None, "sizes and rates by section; None: the preset's", on_command_line=False
    )
    output: Path = option(REQUIRED, "folder of results and stages", writes=True)
    seeds: tuple[int, ...] | None = option(None, "repetitions; None: the preset's")
    model: str | None = option(
        None, "model folder or name on the hub; None: the preset's", reads=True
    )
    revision: str | None = revision_field()
    overwrite: bool = overwrite_field(
        f"{REPLACES_FOLDER}, unless it is one of experiments, which is gone on with"
    )

    def over_the_model(self, sections: Mapping[str, Any]) -> dict[str, Any]:
        """The sections with this model, revision and seeds over what ``[model]`` says."""
        general = dict(sections.get("model") or {})
        if self.model is not None:
            general.pop("revision", None)  # of the preset's own model
        seeds = None if self.seeds is None else list(self.seeds)
        over = {"seeds": seeds, "name": self.model, "revision": self.revision}
        given = {key: value for key, value in over.items() if value is not None}
        return {**sections, "model": general | given}


def sizes_of(name_or_path: str, own: Iterable[str], files: str, section: str) -> dict[str, Any]:
    """The sizes and rates of a preset, ``[SECTION.sizes.…]`` in its file, or all of the file.

    Args:
        own: the short names of the package's presets, whose files begin with ``files``.

    Raises:
        UserError: if there is no such preset, or it is not TOML.
    """
    sections = load_preset(f"{files}-{name_or_path}" if name_or_path in own else name_or_path)
    if section not in sections:
        return sections
    its = sections[section]
    sizes = its.get("sizes") if isinstance(its, dict) else None
    if not isinstance(sizes, dict):
        raise UserError(
            f"preset: expected sections [{section}.sizes.…] in {name_or_path}, got none"
        )
    return sizes


def chosen(name: str, experiments: Iterable[str], sections: Mapping[str, Any]) -> list[str]:
    """The experiments that are asked for.

    Raises:
        UserError: if the preset has none.
    """
    names = [name] if name != ALL else [each for each in experiments if each in sections]
    if not names:
        raise UserError(f"preset: expected sections of {list(experiments)}, got none")
    return names


@contextmanager
def output_for(config: PaperConfig, files: Iterable[str]) -> Iterator[None]:
    """Looks at ``--output`` first, and makes an empty folder of it when all else is checked.

    Args:
        files: the names of the experiments' files, without endings.

    Raises:
        UserError: if something in it is not of experiments, and may not be replaced.
    """
    output, outputs = config.output, outputs_of(config)
    foreign = not (output / STAGES).is_dir() and not is_empty(output)
    if foreign:
        outputs.check_folder(output)
    else:
        for file in (output / f"{name}{end}" for name in files for end in (".json", ".md", ".png")):
            if file.exists():
                outputs.check_file(file.name, file, is_experiment)
    yield
    if foreign:
        write_folder(output, lambda folder: (folder / STAGES).mkdir())


def done_in_turn(names: Iterable[str], run: Callable[[str], Path]) -> Path:
    """Does experiments, prints what each wrote, and returns the last Markdown file."""
    for name in names:
        markdown = run(name)
        print(f"\n{markdown.read_text(encoding='utf-8')}\nwritten to {markdown.parent}")
    return markdown
