"""``train`` in two processes from end to end, once by ``torchrun``, as a user runs it."""

from __future__ import annotations

import io
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


def by_torchrun(*arguments: str) -> str:
    """What ``torchrun -m gdprompt_fast`` prints."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "-m", "gdprompt_fast", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def forked(*arguments: str) -> str:
    """What the command prints in processes that have the imports behind them."""

    def run() -> str:
        assert main(arguments) == 0
        assert isinstance(sys.stdout, io.StringIO)
        return sys.stdout.getvalue()

    return "".join(in_processes(2, run, init=False))


@pytest.mark.parametrize(
    ("launch", "sharding"),
    [
        (by_torchrun, ["optimizer"]),
        (forked, ["full", "--recompute", "block", "--no-check"]),
    ],
)
def test_train_from_end_to_end(
    launch: Callable[..., str],
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
    said = launch("train", *files, *sizes, *more, "--device", "cpu", "--output", str(output))
    assert said.count("model, metrics and figure:") == 1
    assert len(read_metrics(output / METRICS_FILE)) == 2
    for name in ("results.json", "figure.png", "model/model.safetensors", "teacher/key.json"):
        assert (output / name).is_file()
    assert not list(output.rglob(".gdprompt-*"))
