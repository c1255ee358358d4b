"""A process that fails or is lost ends the others soon; its error is said once; a run goes on."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import gdprompt_fast.meta.compute
import gdprompt_fast.training.loop
import gdprompt_fast.training.sharded
from gdprompt_fast.cli.main import BAD_INPUT, FAILED, INTERRUPTED, main
from gdprompt_fast.distributed import launched, rank, watch
from gdprompt_fast.distributed.group import barrier, watched
from gdprompt_fast.distributed.sharded import whole as whole_weight
from gdprompt_fast.meta.failures import found_on_the_device
from gdprompt_fast.training.checkpoint import CHECKPOINTS, MODEL_FOLDER
from gdprompt_fast.training.metrics import METRICS_FILE, read_metrics
from helpers.processes import ends_of

STEPS = 5


@pytest.fixture(scope="module")
def command(model_folder: Path, triples: Path) -> list[str]:
    options = ["--objective", "gold", "--steps", str(STEPS), "--batch-size", "3"]
    options += ["--inner-lr", "0.1", "--outer-lr", "0.1", "--checkpoint-every", "2"]
    options += ["--recompute", "block"]
    files = ["--model", str(model_folder), "--data", str(triples)]
    return ["train", *files, "--device", "cpu", "--no-check", *options]


def after(steps: int, number: int, do: Callable[[], Any]) -> None:
    """Has process ``number`` do something in the place of a later step."""
    step, left = gdprompt_fast.training.loop.fast_meta_step, [steps]

    def wrapped(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0 and rank() == number:
            do()
        return step(*args, **options)

    gdprompt_fast.training.loop.fast_meta_step = wrapped


def while_writing(number: int, do: Callable[[], Any]) -> None:
    """Has process ``number`` do something in the middle of the second checkpoint."""
    write, left = gdprompt_fast.training.sharded.write_tensors, [1]

    def wrapped(path: Path | None, tensors: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] < 0 and rank() == number:
            whole_weight(next(iter(tensors.values())))
            do()
        write(path, tensors)

    gdprompt_fast.training.sharded.write_tensors = wrapped


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / MODEL_FOLDER / "model.safetensors")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights after a run that one process was left alone with."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main([*command, "--output", str(output)]) == 0
    return weights(output)


@pytest.mark.parametrize(
    ("count", "lost", "when", "sharding", "then"),
    [
        (3, 1, partial(after, 4), "none", "full"),
        (2, 0, partial(after, 4), "optimizer", "full"),
        (3, 0, while_writing, "full", "optimizer"),
        (3, 2, while_writing, "full", "none"),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_a_run_of_which_a_process_was_killed_goes_on(
    count: int,
    lost: int,
    when: Callable[[int, Callable[[], Any]], None],
    sharding: str,
    then: str,
    command: list[str],
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    """With another number of processes and sharding, and ends as one that was left alone."""
    killed = tmp_path / "killed"
    command = [*command, "--output", str(killed)]

    def run() -> None:
        when(lost, kill)
        main([*command, "--sharding", sharding])

    began = time.monotonic()
    ended = ends_of(count, run)
    assert time.monotonic() - began < 30
    codes = [each.code for each in ended]
    assert codes[lost] == -signal.SIGKILL, ended
    assert sorted(codes, key=str) == [-signal.SIGKILL, *[FAILED] * (count - 1)]
    said = "".join(each.errors for number, each in enumerate(ended) if number != lost)
    assert said.count("gdprompt") == 1 and "was lost" in said
    assert not (killed / MODEL_FOLDER).exists()
    assert len(read_metrics(killed / METRICS_FILE)) in (4, 5)
    (kept,) = (killed / CHECKPOINTS).glob("step-*")
    assert kept.name == ("step-00000002" if when is while_writing else "step-00000004")

    for each in ends_of(5 - count, lambda: main([*command, "--resume", "--sharding", then])):
        assert each.code == 0, each.errors
    for name, value in whole.items():
        torch.testing.assert_close(weights(killed)[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("number", "sharding"), [(0, "none"), (1, "full")])
def test_an_error_in_one_process_is_said_once_and_ends_all(
    number: int, sharding: str, command: list[str], tmp_path: Path
) -> None:
    def fail() -> None:
        raise FloatingPointError("inner loss: expected a finite number, got nan")

    def run() -> None:
        after(2, number, fail)
        main([*command, "--output", str(tmp_path), "--sharding", sharding])

    ended = ends_of(3, run)
    assert [each.code for each in ended] == [FAILED] * 3
    line = "gdprompt train: stopped: inner loss: expected a finite number, got nan\n"
    assert ended[number].errors.endswith(line)
    assert "".join(each.errors for each in ended).count("gdprompt") == 1
    assert not (tmp_path / MODEL_FOLDER).exists()


def test_a_failure_found_on_the_device_of_one_process_stops_all_before_the_update(
    command: list[str], tmp_path: Path
) -> None:
    """As on a GPU, whose steps are not waited for."""

    def poison() -> None:
        inner = gdprompt_fast.meta.compute.take_inner_steps

        def not_finite(*args: Any, **options: Any) -> Any:
            args[3].add([FloatingPointError("inner loss: not finite")], [torch.tensor(True)])
            return inner(*args, **options)

        gdprompt_fast.meta.compute.take_inner_steps = not_finite

    def run() -> None:
        after(3, 1, poison)
        with found_on_the_device():
            main([*command, "--output", str(tmp_path)])

    ended = ends_of(2, run)
    assert [each.code for each in ended] == [FAILED, FAILED]
    assert "".join(each.errors for each in ended).count("gdprompt train: stopped:") == 1
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 3
    assert not (tmp_path / MODEL_FOLDER).exists()


def test_an_interrupt_of_one_process_is_said_once(command: list[str], tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def run() -> None:
        after(0, 1, interrupt)
        main([*command, "--output", str(tmp_path)])

    first, second = ends_of(2, run)
    assert (first.code, second.code) == (FAILED, INTERRUPTED)
    assert "gdprompt" not in first.errors
    assert second.errors.count("gdprompt train: interrupted; --resume") == 1


def test_an_error_that_nobody_expected_shows_one_traceback(
    command: list[str], tmp_path: Path
) -> None:
    def run() -> None:
        after(2, 1, lambda: 1 / 0)
        main([*command, "--output", str(tmp_path)])

    first, second = ends_of(2, run)
    assert (first.code, second.code) == (1, 1)
    assert "Traceback" not in first.errors and "ZeroDivisionError" in second.errors


def test_bad_input_is_said_once(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what a model that no process has as a whole cannot do."""
    output = ["--output", str(tmp_path / "new"), "--sharding", "full"]
    wrong = {"model": ["--model", str(tmp_path / "none")], "check": ["--check"]}
    for name, options in wrong.items():
        ended = ends_of(2, lambda: main([*command, *output, *options]))  # noqa: B023
        assert {each.code for each in ended} <= {BAD_INPUT, FAILED}
        said = "".join(each.errors for each in ended)
        assert said.count(f"gdprompt train: error: {name}:") == 1, said
    assert not (tmp_path / "new").exists()
    assert main([*command, *output, "--recompute", "none"]) == BAD_INPUT
    assert 'recompute: expected "block" with sharding "full"' in capsys.readouterr().err


def test_a_process_that_is_silent_is_lost(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "BEAT", 0.2)
    monkeypatch.setattr(watch, "SILENCE", 3.0)

    def run() -> None:
        after(0, 1, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        main([*command, "--output", str(tmp_path)])

    first, second, third = ends_of(3, run, longest=30.0)
    assert (first.code, second.code, third.code) == (FAILED, None, FAILED)
    assert (first.errors + third.errors).count("process 1 was lost") == 1


def store_of_the_first() -> dict[str, str]:
    """What has the store go with process 0, as without a launcher's agent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}


@pytest.mark.parametrize("count", [2, 3])
def test_the_process_with_the_store_may_vanish(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without closing its connections, as one that is stopped; no call of its store ends then."""
    monkeypatch.setattr(watch, "BEAT", 0.2)
    monkeypatch.setattr(watch, "SILENCE", 2.0)
    store = store_of_the_first()

    def run() -> None:
        os.environ |= store
        with launched():
            if rank() == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            barrier()

    first, *others = ends_of(count, run, longest=30.0)
    assert first.code is None and {each.code for each in others} == {FAILED}
    for each in others:
        assert each.errors == "gdprompt: stopped: the process that began the others was lost\n"


def test_a_process_that_has_ended_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long another goes on, nor is the store, which goes with one that has; but the next
    one after it may be.
    """
    monkeypatch.setattr(watch, "BEAT", 0.1)
    monkeypatch.setattr(watch, "SILENCE", 1.0)
    store = store_of_the_first()

    def run() -> None:
        os.environ |= store
        dist.init_process_group("gloo")
        with watched():
            time.sleep(2.5 * (dist.get_rank() == 1))
        with watched():
            if dist.get_rank() == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(10.0 * (dist.get_rank() == 0))

    first, second, third = ends_of(3, run, longest=30.0)
    assert (first.code, second.code, third.code) == (FAILED, 0, None), (first, second)
    assert first.errors == "gdprompt: stopped: process 2 was lost\n" and not second.errors


def test_processes_do_not_wait_long_for_one_that_never_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "JOINING", 1.0)

    def run() -> None:
        if os.environ["RANK"] != "1":
            with launched():
                pass

    ended = ends_of(3, run, longest=30.0)
    assert [each.code for each in ended] == [FAILED, 0, FAILED]
    said = "".join(each.errors for each in ended)
    assert said == "gdprompt: stopped: process 1 has not come within 1 s\n"


def test_commands_that_processes_cannot_share_are_errors(tmp_path: Path) -> None:
    arguments = ["data", "people", "--output", str(tmp_path / "people")]
    ended = ends_of(2, lambda: main(arguments))
    assert "".join(each.errors for each in ended).count("data: expected one process, got 2") == 1
    assert not (tmp_path / "people").exists()
