"""What a command may write over: nothing that it does not know to be its own, and never an input.

Known to be ours are JSON files with the mark of the command that wrote them, a report's page with
its mark, a data folder whose ``data.json`` has the mark and the hashes of its files, and a run or
an experiment that is gone on with. For all else ``--overwrite`` has to say that it may go.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .files import is_empty

MARK = "written_by"


def written_by(command: str) -> dict[str, str]:
    """The mark of a command's JSON files."""
    return {MARK: f"gdprompt {command}"}


def is_marked(path: Path, command: str) -> bool:
    """Whether a file is JSON with the mark of the command."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get(MARK) == written_by(command)[MARK]


def check_differ(**outputs: Path) -> None:
    """That no two outputs are the same file, and all have names that safetensors can write.

    Raises:
        ValueError: naming the option, the later one of two.
    """
    seen: dict[Path, str] = {}
    for option, path in outputs.items():
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UserError(f"{option}: expected a path in UTF-8, got {path}") from None
        other = seen.setdefault(_real(path), option)
        if other != option:
            raise UserError(f"{option}: expected another file than for {other}, got {path}")


def _real(path: Path) -> Path:
    """Where a path leads to; as ``Path.resolve``, which has no result for a loop of links."""
    return Path(os.path.realpath(path))


def never(path: Path) -> bool:
    """Nothing of this kind is known to be ours."""
    return False


@dataclass(frozen=True)
class Outputs:
    """What a command must not write over, by the options it was given.

    Attributes:
        inputs: the files and folders that it reads, by option.
        overwrite: whether what is not known to be ours may be replaced.
        written: the files and folders that it writes, by option.
    """

    inputs: Mapping[str, Path]
    overwrite: bool
    written: Mapping[str, Path] = field(default_factory=dict)

    def check_file(
        self, option: str, path: Path | None, ours: Callable[[Path], bool] = never
    ) -> None:
        """That a file can be written at ``path``, if asked for, and replaces nothing it must not.

        Raises:
            ValueError: naming the option, what was expected and what was given.
        """
        if path is None:
            return
        if (path.exists() and not path.is_file()) or not path.parent.is_dir():
            raise UserError(f"{option}: expected a file in an existing folder, got {path}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{option}: expected a file that can be written, got {path}")
        if not path.exists():
            return
        given = [each for each in self.inputs.values() if each.is_file()]
        if _identities([path]) & _identities(given):
            raise UserError(f"{option}: expected another file than an input, got {path}")
        if ours(path):
            return
        if _identities([path]) & _identities(self.inputs.values()):
            raise UserError(f"{option}: expected a file that is no part of an input, got {path}")
        if not self.overwrite:
            raise UserError(
                f"{option}: expected a new file, got {path}, which is not known to be of this "
                "command; --overwrite replaces it"
            )

    def check_folder(self, folder: Path, ours: Callable[[Path], bool] = never) -> None:
        """That ``--output`` may be replaced as a whole.

        Raises:
            ValueError: naming what was expected and what was given.
        """
        if folder.is_symlink() and not folder.exists() and _real(folder).is_symlink():
            raise UserError(f"output: expected a folder, got {folder}, a loop of links")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"output: expected a folder, got the file {folder}")
        if Path.cwd().is_relative_to(_real(folder)):
            raise UserError(
                f"output: expected another folder than the current one or one above, got {folder}"
            )
        for name, given in self.inputs.items():
            if _real(given).is_relative_to(_real(folder)):
                raise UserError(f"output: expected a folder without the {name}, got {folder}")
        for option, path in self.written.items():
            if _real(folder) in _real(path).parents:
                raise UserError(
                    f"{option}: expected a path that is not in --output, which is replaced as a "
                    f"whole, got {path}"
                )
        if is_empty(folder):
            return
        if not (self.overwrite or ours(folder)):
            raise UserError(
                f"output: expected a new or empty folder, got {folder}; --overwrite replaces all "
                "that is in it"
            )
        if _identities([folder]) & _identities(self.inputs.values()):
            raise UserError(f"output: expected a folder without files of an input, got {folder}")


def _identities(paths: Iterable[Path]) -> set[tuple[int, int]]:
    """The files at and in these paths, the same by whatever link they are reached."""
    stats = [file.stat() for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    return {(stat.st_dev, stat.st_ino) for stat in stats}
