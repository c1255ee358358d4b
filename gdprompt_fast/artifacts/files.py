"""Files and folders that are whole or not there, whenever the process is killed.

Of several processes the first writes; for the others there is nothing to do here.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..distributed.group import writes
from ..errors import UserError

# Beside the file or folder of that name; what carries these names is ours to remove.
TEMPORARY, ASIDE = ".gdprompt-tmp", ".gdprompt-old"
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def hash_of_file(path: Path) -> str:
    """The SHA-256 of what a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Has ``write`` fill a temporary folder beside ``folder`` and puts that in its place.

    Killed at any moment, the old folder is there or the new one, whole. Where the file system can
    exchange two folders, nothing else is needed; where it cannot, the old one may be left set
    aside, and :func:`recover` puts it back. What else is left beside it, the next call removes.
    """
    if not writes():
        return
    folder = Path(os.path.realpath(folder))
    recover(folder)
    temporary, aside = _hidden(folder, TEMPORARY), _hidden(folder, ASIDE)
    for leftover in (temporary, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    with _failing_as_files_do(folder):
        write(temporary)
    for path in (*temporary.rglob("*"), temporary):
        _to_disk(path)
    if not folder.exists():
        temporary.rename(folder)
    elif not exchange(temporary, folder):
        folder.rename(aside)
        temporary.rename(folder)
    _to_disk(folder.parent)
    for replaced in (temporary, aside):
        shutil.rmtree(replaced, ignore_errors=True)


def recover(folder: Path) -> None:
    """Puts back a folder that a killed :func:`write_folder` had set aside."""
    if not writes():
        return
    folder = Path(os.path.realpath(folder))
    if folder.name and not folder.exists() and _hidden(folder, ASIDE).is_dir():
        _hidden(folder, ASIDE).rename(folder)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    names = [os.fsencode(one), os.fsencode(other)]
    return bool(rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Has ``write`` make a temporary file beside ``path`` and puts that in its place."""
    if not writes():
        return
    path = Path(os.path.realpath(path))
    temporary = _hidden(path, TEMPORARY)
    with _failing_as_files_do(path):
        write(temporary)
    _to_disk(temporary)
    os.replace(temporary, path)
    _to_disk(path.parent)


def write_file(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all; of a file's name that is no UTF-8 the bytes that are
    none become escapes, as JSON has them.
    """
    content = text.encode("utf-8", "backslashreplace")
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that we wrote.

    Raises:
        ValueError: naming the file, if it does not hold one.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON as it was written, got {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def is_empty(folder: Path) -> bool:
    """Whether there is no such path, or a folder with nothing but what a killed write left."""
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name.endswith(TEMPORARY) for path in folder.iterdir())


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


@contextmanager
def _failing_as_files_do(path: Path) -> Iterator[None]:
    """safetensors and torch have errors of their own for a disk that is full."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        of_torch = any(name in str(error) for name in ("PytorchStreamWriter", "inline_container"))
        if of_torch or isinstance(error, SafetensorError):
            raise OSError(f"{path} could not be written: {error}") from error
        raise


def _to_disk(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk: a name must not get there
    before its content.
    """
    if path.is_dir() and os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
