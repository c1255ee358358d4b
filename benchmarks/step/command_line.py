"""Short commands of ``gdprompt`` on the device, each a row: exit code, seconds, falling losses."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..harness.bench import Bench
from ..harness.jobs import Job, job
from ..harness.rows import ROOT, Row

PROGRAM = "import sys; from gdprompt_fast.cli.main import main; sys.exit(main())"
STEPS, BATCH, PASSAGES = 20, 8, 40
QUESTIONS = 4  # on a passage
INNER_LR = "0.5"  # the demo's
ENDS = 5  # steps at either end of the training whose mean losses are compared


def data(folder: Path, passages: int) -> Path:
    """Passages of facts about invented people."""
    from gdprompt_fast.data import write_triples
    from gdprompt_fast.data.people import make_people_data

    path = folder / "people.jsonl"
    write_triples(make_people_data(QUESTIONS * passages, 1, seed=0).train.to_list(), path)
    return path


def arguments(command: str, folder: Path, bench: Bench) -> list[str]:
    from gdprompt_fast.bundled import bundled_folder

    passages = PASSAGES if command == "train" else 4
    common = ["--model", str(bundled_folder()), "--data", str(data(folder, passages))]
    common += ["--device", bench.device.type, "--inner-lr", INNER_LR]
    own = {
        "train": [
            *("--output", str(folder / "run"), "--steps", str(STEPS), "--batch-size", str(BATCH)),
            *("--queries-per-context", str(QUESTIONS), "--outer-lr", "1e-3"),
            *("--warmup-steps", "2", "--answer-tokens", "8"),
        ],
        "evaluate": ["--answer-tokens", "8", "--results", str(folder / "results.json")],
        "check": ["--examples", "1", "--json", str(folder / "check.json")],
    }
    return [command, *common, *own[command]]


def run_command(bench: Bench, command: str) -> Row:
    """In a process of its own; of a training also the means of the first and of the last losses."""
    if importlib.util.find_spec("datasets") is None:
        return {"status": "not available: no module datasets"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        line = [sys.executable, "-c", PROGRAM, *arguments(command, folder, bench)]
        start = time.perf_counter()
        done = subprocess.run(
            line, cwd=ROOT, capture_output=True, text=True, timeout=bench.job_limit_s - 5
        )
        row: Row = dict(exit_code=done.returncode, elapsed_s=time.perf_counter() - start)
        if done.returncode:
            sys.stderr.write(done.stdout[-3000:] + done.stderr[-3000:])
            said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
            return {**row, "status": f"failed: {said}"[:600]}
        return {**row, "status": "passed", **(losses(folder) if command == "train" else {})}


def losses(folder: Path) -> Row:
    from gdprompt_fast.training.metrics import METRICS_FILE, read_metrics

    outer = [each["outer_loss"] for each in read_metrics(folder / "run" / METRICS_FILE)]
    first, last = statistics.mean(outer[:ENDS]), statistics.mean(outer[-ENDS:])
    row: Row = dict(first_loss=first, last_loss=last)
    if len(outer) != STEPS or not last < first:
        row["status"] = f"failed: {len(outer)} steps took the loss from {first:.3f} to {last:.3f}"
    return row


def command_jobs(bench: Bench) -> Iterator[Job]:
    for command in ("train", "evaluate", "check"):
        yield job(
            functools.partial(run_command, bench, command),
            section="command line",
            kind="command",
            op="gdprompt",
            pass_=command,
            case="the bundled model",
            dtype="float32",
        )
