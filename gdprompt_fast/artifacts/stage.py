"""Work that is kept under the settings it follows from, and never done twice.

A stage is a folder with the record of its settings; a part of one is a result under a name.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ..errors import UserError
from .files import read_json, write_json

try:
    import fcntl
except ImportError:  # Windows: stages of one folder are done by one process at a time
    fcntl = None  # type: ignore[assignment]

STAGE_FILE, LOCK_FILE = "stage.json", "lock"

Result = dict[str, Any]


class StaleStage(UserError):
    """A folder holds a stage that was done with other settings than those asked for."""


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        folder: what it wrote, beside the record of it.
        settings: all that its result follows from, the keys of the stages it builds on among them.
        result: what it said, for JSON.
        seconds: the time it took, with what an interruption did not undo.
        versions: of the packages it was done with.
    """

    folder: Path
    settings: dict[str, Any]
    result: Result
    seconds: float
    versions: dict[str, str]

    @property
    def key(self) -> str:
        """A short name of the settings, for stages that build on this one."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_stage(
    folder: Path,
    settings: Mapping[str, Any],
    work: Callable[[Path], Result],
    versions: Mapping[str, str] | None = None,
) -> Stage:
    """The stage in ``folder``: read if it is finished, else done by ``work(folder)``.

    Interrupted work is called again with the same folder, and may go on from what it left there.
    Of several processes that ask for it one does the work and the others wait for it.

    Args:
        settings: all that the result follows from.
        versions: of the packages, for the record of work that is begun.

    Raises:
        StaleStage: if the folder belongs to a stage with other settings.
    """
    new: dict[str, Any] = {
        "settings": json.loads(json.dumps(settings)),
        "seconds": 0.0,
        "versions": dict(versions or {}),
        "result": None,
    }
    record = _read_record(folder, new)
    if record["result"] is None:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            record = _read_record(folder, new)  # another process may have finished it meanwhile
            if record["result"] is None:
                _do(folder, record, work)
    return Stage(folder=folder, **record)


def _read_record(folder: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The record of a stage that was begun, or that of a new one."""
    path = folder / STAGE_FILE
    if not path.exists():
        return new
    read = read_json(path)
    if new.keys() != read.keys() or not isinstance(read["settings"], dict):
        raise UserError(f"{path}: expected {', '.join(new)} of a stage, got {short(read)}")
    _check_same(folder, read["settings"], new["settings"])
    return read


def _do(folder: Path, record: dict[str, Any], work: Callable[[Path], Result]) -> None:
    """Does the work of a stage and completes its record."""
    path = folder / STAGE_FILE
    write_json(path, record)
    start, before = time.monotonic(), record["seconds"]
    try:
        record["result"] = work(folder)
    finally:
        record["seconds"] = before + time.monotonic() - start
        write_json(path, record)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside, no other process is inside with the same folder; a killed one leaves at once."""
    if fcntl is None:
        yield
        return
    with (folder / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_same(folder: Path, done: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, (old, new) in sorted(differences(_flat(done), _flat(wanted)).items()):
        raise StaleStage(
            f"{name}: expected {old!r} as in {folder}, got {new!r}; "
            "remove that folder to have it done again, or give another --output"
        )


def differences(done: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values that differ, by name: what was done, and what is wanted. A name that is missing on
    one side counts as None there.
    """
    pairs = {name: (done.get(name), wanted.get(name)) for name in {**wanted, **done}}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def kept(
    path: Path, make: Callable[[], dict[str, Any]], read: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """What is read from a JSON file, which is made now if it is not there."""
    if not path.exists():
        write_json(path, make())
    return read(path)


class KeptResults:
    """Results by name in a JSON file, which is written again with each.

    Attributes:
        content: the results so far.
    """

    def __init__(self, path: Path, read: Callable[[Path], dict[str, Any]]) -> None:
        self._path = path
        self.content = read(path) if path.exists() else {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of this name, made now if it is not there."""
        if name not in self.content:
            self.keep(name, make())
        return self.content[name]

    def keep(self, name: str, result: Any) -> None:
        """Puts a result in the place of an older one."""
        self.content[name] = result
        write_json(self._path, self.content)
