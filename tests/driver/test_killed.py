"""Training that the system kills at any moment ends, continued, with the bits of one left alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gdprompt_fast.cli.main import main
from gdprompt_fast.data import write_triples
from gdprompt_fast.data.people import make_people_data
from gdprompt_fast.teacher import cache

EXAMPLES, SHARD_EXAMPLES = 60, 2
STEPS = ["--steps", "24", "--batch-size", "2", "--inner-lr", "0.1", "--checkpoint-every", "3"]
GROUPS = ["--batch-size", "1", "--contexts-per-group", "2", "--queries-per-context", "2"]


@pytest.fixture
def command(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training of a tiny model, with little to do in a step."""
    monkeypatch.setattr(cache, "SHARD_EXAMPLES", SHARD_EXAMPLES)
    data = tmp_path / "triples.jsonl"
    write_triples(make_people_data(1, EXAMPLES, seed=0).test.to_list(), data)
    return ["train", "--model", str(model_folder), "--data", str(data), "--device", "cpu"]


def kill_when(ready: Callable[[], bool], command: list[str]) -> None:
    """Runs a command in a process of its own, forked from this, and kills that when ``ready``."""
    process = multiprocessing.get_context("fork").Process(target=silently, args=(command,))
    process.start()
    while process.is_alive() and not ready():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"


def silently(command: list[str]) -> None:
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        main(command)


def rows(output: Path) -> int:
    """The steps in a run's metrics."""
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def same_end(command: list[str], killed: Path, whole: Path) -> None:
    """Continues a killed run, repeats it without a kill, and compares what the two leave."""
    assert main([*command, "--output", str(killed), "--resume"]) == 0
    assert main([*command, "--output", str(whole)]) == 0
    files = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert Path("model/model.safetensors") in files
    for file in (*files, Path("metrics.jsonl")):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file


def test_with_the_gold_objective(command: list[str], tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    command += ["--objective", "gold", *STEPS]
    kill_when(lambda: rows(killed) >= 5, [*command, "--output", str(killed)])
    assert not (killed / "model").exists()
    same_end(command, killed, tmp_path / "whole")


def test_with_a_teacher_groups_and_joint_training(command: list[str], tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    command += ["--objective", "kl", "--answer-tokens", "3", "--teacher-batch-size", "1"]
    command += [*STEPS, *GROUPS, "--joint-data", str(tmp_path / "triples.jsonl")]

    def shards() -> int:
        return len(list(killed.glob("teacher/shard-*")))

    kill_when(lambda: shards() >= 2, [*command, "--output", str(killed)])
    assert shards() < EXAMPLES // SHARD_EXAMPLES
    resumed = [*command, "--output", str(killed), "--resume"]
    kill_when(lambda: rows(killed) >= 5, resumed)
    assert not (killed / "model").exists()
    same_end(command, killed, tmp_path / "whole")
