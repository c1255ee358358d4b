"""What is kept beside θ': how it was learnt, from what, and what of it was discarded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..artifacts.files import read_json, write_json
from ..artifacts.outputs import MARK
from ..errors import UserError

RECORD_FILE = "gdprompt.json"
WRITER = "gdprompt_fast save_pretrained"


@dataclass(frozen=True)
class Learnt:
    """How θ' was learnt.

    Attributes:
        inner_lr: η; None where it was no one number.
        inner_steps: the number of inner steps.
        inner_params: what they moved.
        texts: the contexts, if they are known.
    """

    inner_lr: float | None = None
    inner_steps: int = 1
    inner_params: str = "full"
    texts: tuple[str, ...] = ()


def write_record(folder: Path, learnt: Learnt, kept: dict[str, Any]) -> None:
    """Writes the record of a folder; ``kept`` is what it holds of θ'."""
    write_json(folder / RECORD_FILE, {MARK: WRITER, **asdict(learnt), **kept})


def read_record(folder: Path) -> dict[str, Any]:
    """The record in a folder of an adapter or model that we wrote.

    Raises:
        UserError: if there is none.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise UserError(
            f"folder: expected one that save_pretrained wrote, got {folder} without a {path.name}"
        )
    record = read_json(path)
    if record.get(MARK) != WRITER:
        raise UserError(f"{path}: expected the mark of {WRITER!r}, got {record.get(MARK)!r}")
    return record


def learnt_in(folder: Path) -> Learnt:
    """How the θ' in a folder was learnt.

    Raises:
        UserError: if there is none, or its record is not as it was written.
    """
    record = read_record(folder)
    rate, steps = record.get("inner_lr"), record.get("inner_steps")
    params, texts = record.get("inner_params"), record.get("texts")
    right = (
        (rate is None or isinstance(rate, float | int))
        and isinstance(steps, int)
        and isinstance(params, str)
        and isinstance(texts, list)
        and all(isinstance(text, str) for text in texts)
    )
    if not right:
        names = ", ".join(each.name for each in fields(Learnt))
        raise UserError(f"{folder / RECORD_FILE}: expected {names} as they were written")
    assert isinstance(steps, int) and isinstance(params, str) and isinstance(texts, list)
    return Learnt(rate, steps, params, tuple(texts))
