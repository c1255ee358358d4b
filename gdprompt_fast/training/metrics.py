"""The metrics of a training: a row a step, as JSONL and for TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..artifacts.files import write_whole
from ..distributed.group import rank
from ..errors import UserError

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
LOSS = "query_loss"  # the curve that is drawn


class MetricsLog:
    """A JSONL file with one row a step; opened at ``step``, it forgets what came after.

    The same numbers go to event files in the folder ``tensorboard`` beside it where TensorBoard is
    installed. Of several processes the first writes.
    """

    def __init__(self, path: Path, step: int) -> None:
        rows = path.read_bytes().split(b"\n")[:step] if path.exists() else []
        write_whole(path, lambda new: new.write_bytes(b"".join(row + b"\n" for row in rows)))
        writes = rank() == 0
        self._file = path.open("a", encoding="utf-8") if writes else None
        self._events = _event_writer(path.parent / EVENTS_FOLDER, step) if writes else None

    def write(self, row: dict[str, float]) -> None:
        """Appends the row of ``row["step"]``; it is on its way to the disk when this returns."""
        if self._file is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in row.items():
                if name != "step":
                    self._events.add_scalar(name, value, int(row["step"]))
            self._events.flush()

    def to_disk(self) -> None:
        """Waits until all rows are on the disk, where a checkpoint after them will be."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def _event_writer(folder: Path, step: int) -> Any:
    """A TensorBoard writer that hides the events after ``step``; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file."""
    return check_metrics(path, path.read_bytes().count(b"\n"))


def check_metrics(path: Path, steps: int) -> list[dict[str, float]]:
    """The rows of the first ``steps`` steps in a metrics file.

    Raises:
        ValueError: naming the file and the line that is not the row of its step.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number in range(1, steps + 1):
        try:
            row = json.loads(lines[number - 1])
            numbers = all(isinstance(value, int | float) for value in row.values())
        except (IndexError, ValueError, AttributeError, RecursionError):
            row, numbers = {}, False
        if not numbers or row.get("step") != number:
            raise UserError(f"{path}, line {number}: expected the numbers of step {number}")
        rows.append(row)
    return rows
