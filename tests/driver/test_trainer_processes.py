"""A MetaTrainer in several processes, and its example as a user runs it."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import TrainerCallback

from gdprompt_fast.teacher import TeacherCache
from helpers.paths import ROOT
from helpers.processes import ends_of, in_processes
from helpers.trainer import trainer_on
from helpers.trainer_process import run


def python(*arguments: str) -> str:
    """What a script prints, with the repository's modules at hand."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launched_by_accelerate(output: Path) -> None:
    """Two processes; without --multi_gpu it would want MPI for them on a CPU."""
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    launch += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    launch += ("--main_process_port", "0")
    script = str(ROOT / "tests" / "helpers" / "trainer_process.py")
    python(*launch, script, str(output), "2", "2")


def forget_accelerate() -> None:
    """As in a process of its own, what this one was to accelerate before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def forked(output: Path) -> None:
    """Three processes."""

    def work() -> None:
        forget_accelerate()
        run(output, 2, 2)

    in_processes(3, work, init=False)


@pytest.mark.parametrize(("count", "start"), [(2, launched_by_accelerate), (3, forked)])
def test_processes_give_what_one_gives_with_the_whole_batch(
    count: int, start: Callable[[Path], None], tmp_path: Path
) -> None:
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    shared.mkdir()
    alone.mkdir()
    start(shared)
    run(alone, 4 * count, 1)
    whole: dict[str, Any] = torch.load(alone / "result-0.pt")
    results = [torch.load(path) for path in sorted(shared.glob("result-*"))]
    assert [each["processes"] for each in (whole, *results)] == [1, *[count] * count]
    for name, value in whole["weights"].items():
        assert all(torch.equal(results[0]["weights"][name], of["weights"][name]) for of in results)
        torch.testing.assert_close(results[0]["weights"][name], value, rtol=1e-9, atol=1e-12)
    for each in results:
        assert each["losses"] == pytest.approx(whole["losses"], rel=1e-6)  # kept in float32
        assert each["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    assert (shared / "checkpoint-3" / "model.safetensors").is_file()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise FloatingPointError("inner loss: not finite")


@pytest.mark.parametrize(
    ("count", "do", "said"), [(2, kill, "was lost"), (3, fail, "FloatingPointError: inner loss")]
)
def test_one_that_fails_or_is_lost_ends_the_others(
    count: int, do: Callable[[], None], said: str, tmp_path: Path
) -> None:
    """At its second step, while they wait for its gradients; why is said once."""

    class Failing(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 1 and args.process_index == 1:
                do()

    def work() -> None:
        forget_accelerate()
        trainer_on(tmp_path, callbacks=[Failing()]).train()

    began = time.monotonic()
    ended = ends_of(count, work)
    assert time.monotonic() - began < 30
    codes = [each.code for each in ended]
    assert codes.pop(1) in (-signal.SIGKILL, 1) and set(codes) == {1}, ended
    errors = [each.errors for each in ended if "Traceback" in each.errors]
    assert len(errors) == 1 and said in errors[0], ended


def test_one_process_of_all_machines_has_the_teacher_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others read the folder, which they share, once it is written."""
    log, build = tmp_path / "log", TeacherCache.build

    def logged(*args: Any) -> TeacherCache:
        folder = args[0]
        found = len(list(folder.glob("*")))
        cache = build(*args)
        with log.open("a") as file:
            file.write(f"{found < len(list(folder.glob('*')))} ")
        return cache

    def work() -> None:
        forget_accelerate()
        os.environ["LOCAL_RANK"] = "0"  # each the first of a machine
        monkeypatch.setattr(TeacherCache, "build", logged)
        trainer_on(tmp_path, objective="kl", answer_tokens=3)

    in_processes(2, work, init=False)
    assert log.read_text().split() == ["True", "False"] * 2  # to train on, and to evaluate


def test_the_example_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(ROOT / "examples" / "meta_trainer.py")
    steps = ("--max_steps", "4", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true")
    monkeypatch.setattr(sys, "argv", [script, "--output_dir", str(tmp_path), *steps])
    runpy.run_path(script, run_name="__main__")
    said = capsys.readouterr().out
    before, after = map(float, re.findall(r"(?:before|after) ([\d.]+)", said))
    assert after < before
    assert (tmp_path / "model.safetensors").is_file()
