"""Steps as a GPU takes them: nothing is waited for, and no failure reaches weights or files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gdprompt_fast.training.loop
from gdprompt_fast import fast_meta_step
from gdprompt_fast.data import Example
from gdprompt_fast.meta.failures import found_on_the_device
from gdprompt_fast.training.finetune import PrepareOptions, fine_tune
from gdprompt_fast.training.late import LateNumbers
from gdprompt_fast.training.loop import meta_train
from gdprompt_fast.training.metrics import read_metrics
from gdprompt_fast.training.optim import ClippedAdam
from helpers.killing import Killed, killed_after
from helpers.training import GOLD, GROUPED, TOKENIZER, run, tiny_llama


def test_numbers_are_read_in_order_and_one_late() -> None:
    read: list[dict[str, float]] = []
    with found_on_the_device():
        late = LateNumbers(torch.device("cpu"))
    for step in range(3):
        late.add({"step": step, "loss": torch.tensor(0.1 * step)}, read.append)
        assert [numbers["step"] for numbers in read] == list(range(step))
    late.read_all()
    assert read[2] == {"step": 2, "loss": float(torch.tensor(0.2))}
    at_once = LateNumbers(torch.device("cpu"))
    at_once.add({"loss": torch.tensor(3.0)}, read.append)
    assert read[3] == {"loss": 3.0}


def test_a_fused_update_is_the_plain_one_at_every_rate() -> None:
    weights = []
    for on_the_device in (False, True):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(5))
        if on_the_device:
            with found_on_the_device():
                optimizer = ClippedAdam([parameter], clip_norm=1.0)
        else:
            optimizer = ClippedAdam([parameter], clip_norm=1.0)
        for step, rate in enumerate((0.1, 0.02, 0.3)):
            parameter.grad = torch.randn(5)
            optimizer.update(rate, step)
        weights.append(parameter.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("found", [True, False], ids=["found_inf", "norm"])
def test_from_a_step_that_is_not_finite_on_nothing_is_updated(found: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    with found_on_the_device():
        optimizer = ClippedAdam([parameter], clip_norm=1.0)
    parameter.grad = torch.ones(3)
    optimizer.update(0.1, step=0)
    before = parameter.detach().clone()
    for failed in (True, False):
        parameter.grad = torch.full((3,), torch.nan if failed and not found else 1.0)
        optimizer.update(0.1, step=1, found_inf=torch.tensor(float(failed and found)))
        assert torch.equal(parameter, before)
        assert optimizer.adam.state[parameter]["step"] == 1


def as_on_a_gpu(options: Any, examples: list[Example], output: Path, **also: Any) -> Any:
    with found_on_the_device():
        return run(options, examples, output, **also)


@pytest.mark.parametrize("options", [GOLD, GROUPED], ids=["gold", "kl with groups"])
def test_a_run_that_waits_for_nothing_ends_as_one_that_does(
    options: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = examples[:3] if options is GROUPED else None
    waiting = run(options, examples, tmp_path / "a", joint=joint)
    late = as_on_a_gpu(options, examples, tmp_path / "b", joint=joint)
    for name, value in waiting.items():
        torch.testing.assert_close(late[name], value, msg=name)
    rows = read_metrics(tmp_path / "b" / "metrics.jsonl")
    for row, same in zip(rows, read_metrics(tmp_path / "a" / "metrics.jsonl"), strict=True):
        assert row == pytest.approx(same, rel=1e-4)
    with monkeypatch.context() as patch:
        step = killed_after(5, fast_meta_step)
        patch.setattr(gdprompt_fast.training.loop, "fast_meta_step", step)
        with pytest.raises(Killed):
            as_on_a_gpu(options, examples, tmp_path / "c", joint=joint)
    assert len(read_metrics(tmp_path / "c" / "metrics.jsonl")) == 4
    resumed = as_on_a_gpu(options, examples, tmp_path / "c", joint=joint)
    assert all(torch.equal(resumed[name], value) for name, value in late.items())
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in "bc"]
    assert metrics[0] == metrics[1]


def test_a_run_of_one_kind_of_device_can_be_continued_on_another(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(GOLD, examples, tmp_path / "a")
    for begin, go_on in ((run, as_on_a_gpu), (as_on_a_gpu, run)):
        output = tmp_path / begin.__name__
        with monkeypatch.context() as patch:
            step = killed_after(4, fast_meta_step)
            patch.setattr(gdprompt_fast.training.loop, "fast_meta_step", step)
            with pytest.raises(Killed):
                begin(GOLD, examples, output)
        assert (output / "checkpoints" / "step-00000003").exists()
        resumed = go_on(GOLD, examples, output)
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, msg=name)


def poisoned(at: int, poison: Callable[[Any, Any], None]) -> Callable[..., Any]:
    """``fast_meta_step``, with something not finite at a call."""
    calls = [0]

    def step(model: Any, batch: Any, **arguments: Any) -> Any:
        out = fast_meta_step(model, batch, **arguments)
        if calls[0] == at:
            poison(model, out)
        calls[0] += 1
        return out

    return step


def poison_loss(model: Any, out: Any) -> None:
    error = FloatingPointError("inner loss: expected finite numbers")
    out.failures.add([error], [torch.tensor(True)])


def poison_gradient(model: Any, out: Any) -> None:
    next(model.parameters()).grad[0] = torch.nan


@pytest.mark.parametrize(
    ("poison", "message"),
    [(poison_loss, "inner loss: expected finite"), (poison_gradient, "its norm is nan at step 4")],
    ids=["loss", "gradient"],
)
@pytest.mark.parametrize("every", [5, 6, 9])
def test_a_step_that_fails_touches_no_weight_and_is_never_saved(
    poison: Callable[[Any, Any], None],
    message: str,
    every: int,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = dataclasses.replace(GOLD, steps=9, checkpoint_every=3)
    with monkeypatch.context() as patch, found_on_the_device():
        patch.setattr(
            gdprompt_fast.training.loop, "fast_meta_step", killed_after(4, fast_meta_step)
        )
        expected = tiny_llama()
        with pytest.raises(Killed):
            meta_train(expected, TOKENIZER, examples, good, tmp_path / "a")
    model = tiny_llama()
    options = dataclasses.replace(good, checkpoint_every=every)
    with monkeypatch.context() as patch, found_on_the_device():
        patch.setattr(gdprompt_fast.training.loop, "fast_meta_step", poisoned(4, poison))
        with pytest.raises(FloatingPointError, match=message):
            meta_train(model, TOKENIZER, examples, options, tmp_path / "b")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True)
    )
    assert not (tmp_path / "b" / "checkpoints").exists()
    assert not (tmp_path / "b" / "model").exists()
    assert len(read_metrics(tmp_path / "b" / "metrics.jsonl")) == 4


def test_preparation_that_fails_touches_no_weight(examples: list[Example]) -> None:
    model = tiny_llama()
    model.model.norm.weight.data[0] = torch.inf
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with found_on_the_device(), pytest.raises(FloatingPointError, match="loss: it is nan at step"):
        fine_tune(model, examples, PrepareOptions(steps=3, batch_size=2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
