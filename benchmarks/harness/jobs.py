"""A list of jobs becomes rows: gates beside each other in many processes, times one by one."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .isolate import Pool, Work, Worker
from .rows import Row, append, row_of

GRACE_S = 10  # that a job may take beyond the budget
RETRIED = ("out of memory", "crashed")  # may be for what ran beside it
GOOD = ("measured", "passed", "warmed", "interpreter")
Gate = tuple[str, str]  # op and pass


@dataclass(frozen=True)
class Job:
    """A row to be.

    Attributes:
        row: what is known before.
        run: returns the rest, in a process of its own; a pickled function and its arguments.
        worker: jobs of one name run one after another in one process, nothing beside them, so that
            they are timed; ``""`` for a job that runs beside others.
        gates: without these, passed, nothing is timed.
    """

    row: Row
    run: Work
    worker: str = ""
    gates: tuple[Gate, ...] = ()

    @property
    def label(self) -> str:
        """What ``--only`` and ``--skip`` look at."""
        names = ("section", "kind", "op", "pass", "provider", "case", "dtype")
        return " ".join(str(self.row[name]) for name in names if self.row[name])


def job(run: Work, worker: str = "", gates: Iterable[Gate] = (), **row: Any) -> Job:
    return Job(row_of(**row), run, worker, tuple(gates))


def chosen(jobs: Sequence[Job], only: str | None, skip: str | None) -> list[Job]:
    """Those whose label has ``only`` somewhere in it and not ``skip``, regular expressions."""
    return [
        each
        for each in jobs
        if (only is None or re.search(only, each.label))
        and (skip is None or not re.search(skip, each.label))
    ]


class Run:
    """What the jobs of a run share.

    Args:
        common: columns of every row.
        new_worker: makes a process for jobs.
        end: on :func:`time.time`'s clock; no job begins later.
        job_limit_s: a job that takes longer hangs.

    Attributes:
        rows: those of this run so far.
    """

    def __init__(
        self,
        results: Path,
        common: Row,
        new_worker: Callable[[], Worker],
        end: float,
        job_limit_s: float,
    ) -> None:
        self.results, self.common, self.new_worker = results, common, new_worker
        self.end, self.job_limit_s = end, job_limit_s
        self.rows: list[Row] = []

    def do(self, jobs: Sequence[Job], processes: int) -> list[Row]:
        """Those beside each other first, in as many processes; then the others, in order."""
        beside = [each for each in jobs if not each.worker]
        in_turn = [each for each in jobs if each.worker]
        workers = {each.worker: self.new_worker() for each in in_turn}
        if len(workers) < (os.cpu_count() or 1):
            for worker in workers.values():  # they get ready meanwhile
                worker.start()
        progress = tqdm(total=len(jobs), unit="row", mininterval=1.0)
        for each, row in self._side_by_side(beside, processes):
            self._record(each, row, progress)
        for index, each in enumerate(in_turn):
            progress.set_description(each.label, refresh=False)
            self._record(each, self._run(workers[each.worker], each), progress)
            if each.worker not in {later.worker for later in in_turn[index + 1 :]}:
                workers[each.worker].close()
        progress.close()
        return self.rows

    def _side_by_side(self, jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Row]]:
        """What failed for what ran beside it, perhaps, is tried again alone."""
        count = min(processes, len(jobs))
        pool: Pool[Job] = Pool([self.new_worker() for _ in range(count)])
        again: list[Job] = []
        for each, row in pool.outcomes(jobs, self._run):
            if count > 1 and row["status"].startswith(RETRIED):
                again.append(each)
            else:
                yield each, row
        with self.new_worker() as worker:
            for each in again:
                yield each, self._run(worker, each)

    def _run(self, worker: Worker, each: Job) -> Row:
        left = self.end - time.time()
        if left <= 0:
            return {"status": "out of time"}
        if failed := self.failed_gates(each.gates):
            where = f"{failed[0]['pass']}, {failed[0]['case']} {failed[0]['dtype']}"
            return {"status": f"not timed: gate on {where} not passed"}
        return worker.run(min(self.job_limit_s, left + GRACE_S), each.run)

    def failed_gates(self, gates: Sequence[Gate]) -> list[Row]:
        return [
            row
            for row in self.rows
            if row["kind"] == "gate"
            and (row["op"], row["pass"]) in gates
            and not row["status"].startswith("passed")
        ]

    def _record(self, each: Job, outcome: Row, progress: Any) -> None:
        row = row_of(**{**each.row, **self.common, **outcome})
        if row["rate"] and (ceiling := self.ceiling(row["ceiling"])):
            row["ceiling_ratio"] = row["rate"] / ceiling
        if row["op"] == "step" and row["median_ms"] and (base := self.ordinary(row)):
            row["ordinary_ms"] = base
            row["ratio_to_ordinary"] = row["median_ms"] / base
        self.rows.append(row)
        append(self.results, row)
        progress.set_description(each.label, refresh=False)
        progress.update()

    def ceiling(self, name: str) -> float | None:
        """Bytes or FLOPs per second."""
        found = [r["rate"] for r in self.rows if r["kind"] == "ceiling" and r["op"] == name]
        return found[-1] if found else None

    def ordinary(self, row: Row) -> float | None:
        """Milliseconds of the ordinary step of the same case; a row may be that step itself."""
        same = [r for r in [*self.rows, row] if r["op"] == "step" and r["case"] == row["case"]]
        times = [r["median_ms"] for r in same if r["provider"] == "ordinary" and r["median_ms"]]
        return times[-1] if times else None
