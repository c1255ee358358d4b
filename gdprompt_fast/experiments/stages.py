"""Stages of work: each has a folder, is kept there and is never done twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
import transformers

from .. import __version__
from ..artifacts.files import read_json, write_json
from ..errors import UserError

STAGE_FILE = "stage.json"

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


def versions() -> dict[str, str]:
    """What a result may depend on besides its settings."""
    return {
        "gdprompt_fast": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def run_stage(folder: Path, settings: Mapping[str, Any], work: Callable[[Path], Result]) -> Stage:
    """The stage in ``folder``: read if it is finished, else done by ``work(folder)``.

    Interrupted work is called again with the same folder, and may go on from what it left there.

    Raises:
        StaleStage: if the folder belongs to a stage with other settings.
    """
    path = folder / STAGE_FILE
    settings = json.loads(json.dumps(settings))
    record: dict[str, Any] = {
        "settings": settings,
        "seconds": 0.0,
        "versions": versions(),
        "result": None,
    }
    if path.exists():
        read = read_json(path)
        if record.keys() != read.keys() or not isinstance(read["settings"], dict):
            raise UserError(f"{path}: expected {', '.join(record)} of a stage, got {short(read)}")
        record = read
        _check_same(folder, record["settings"], settings)
    if record["result"] is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        start, before = time.monotonic(), record["seconds"]
        try:
            record["result"] = work(folder)
        finally:
            record["seconds"] = before + time.monotonic() - start
            write_json(path, record)
    return Stage(folder=folder, **record)


def _check_same(folder: Path, done: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    old, new = _flat(done), _flat(wanted)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise StaleStage(
                f"{name}: expected {old.get(name)!r} as in {folder}, got {new.get(name)!r}; "
                "remove that folder to have it done again, or give another --output"
            )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
