"""``torchrun -m gdprompt_fast``, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gdprompt_fast.cli.main import main
from gdprompt_fast.training.metrics import METRICS_FILE, read_metrics
from helpers.paths import ROOT
from helpers.processes import in_processes


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "-m", "gdprompt_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def of_the_launcher(arguments: list[str]) -> str:
    """What two processes of torchrun print."""
    done = torchrun(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def forked(arguments: list[str]) -> str:
    """What two processes print that are forked."""

    def work() -> str:
        assert main(arguments) == 0
        return sys.stdout.getvalue()  # type: ignore[attr-defined]

    return "".join(in_processes(2, work, init=False))


@pytest.mark.parametrize(
    ("start", "sharding"),
    [
        (of_the_launcher, ["optimizer"]),
        (forked, ["full", "--recompute", "block", "--no-check"]),
    ],
)
def test_train_from_end_to_end(
    start: Callable[[list[str]], str],
    sharding: list[str],
    model_folder: Path,
    triples: Path,
    tmp_path: Path,
) -> None:
    """With a teacher, an evaluation, and the check where a process has the whole model; the first
    process alone prints.
    """
    output = tmp_path / "run"
    files = ["--model", str(model_folder), "--data", str(triples), "--test-data", str(triples)]
    sizes = ["--steps", "2", "--batch-size", "3", "--inner-lr-grid", "0.1", "--answer-tokens", "3"]
    more = ["--teacher-batch-size", "4", "--eval-batch-size", "4", "--sharding", *sharding]
    printed = start(["train", *files, *sizes, *more, "--device", "cpu", "--output", str(output)])
    assert printed.count("model, metrics and figure:") == 1
    assert len(read_metrics(output / METRICS_FILE)) == 2
    for name in ("results.json", "figure.png", "model/model.safetensors", "teacher/key.json"):
        assert (output / name).is_file()
    assert not list(output.rglob(".gdprompt-*"))
