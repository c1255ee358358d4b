"""The ways of benchmarks/step/baselines.py: the exact ones have the reference's gradient."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.step import baselines, cases
from gdprompt_fast import MetaBatch, TeacherTargets, reference_meta_step
from gdprompt_fast.models.memory import peak_bytes_over_model
from gdprompt_fast.reference.compare import Gradients, gradients_of, without_upcasts, worst_error

INNER_LR = 0.05


def teacher_of(model: nn.Module, batch: MetaBatch) -> TeacherTargets:
    """Any confident predictions of the responses serve."""
    head = model.get_output_embeddings().weight.detach()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(1)
    shape = int(batch.response_mask.sum()), head.shape[1]
    hidden = torch.randn(shape, generator=generator, dtype=head.dtype)
    return TeacherTargets(hidden=hidden, head=head)


def gradient_of(way: str, task: Any) -> Gradients:
    with without_upcasts(task.model):
        return gradients_of(lambda *_: baselines.WAYS[way](task), task.model, task.batch)[1]


def expected_gradient(task: Any, **options: Any) -> Gradients:
    options |= dict(inner_lr=task.inner_lr, inner_params=task.inner_params, teacher=task.teacher)
    with without_upcasts(task.model):
        return gradients_of(reference_meta_step, task.model, task.batch, **options)[1]


@pytest.fixture
def task(
    tiny_model: Callable[..., nn.Module],
    lora_model: Callable[..., nn.Module],
    make_batch: Callable[[str], MetaBatch],
    request: pytest.FixtureRequest,
) -> Any:
    """Ragged rows; the parameter names what is trained outside and what the inner step moves."""
    outside, inside = getattr(request, "param", "full-full").split("-")
    model = lora_model() if outside == "lora" else tiny_model()
    batch = make_batch("one-each")
    teacher = teacher_of(model, batch)
    return baselines.LeanMAML(model, batch, teacher, inner_lr=INNER_LR, inner_params=inside)


KINDS = pytest.mark.parametrize("task", ["full-full", "lora-full", "lora-lora"], indirect=True)


@KINDS
@pytest.mark.parametrize("way", baselines.EXACT)
def test_an_exact_way_has_the_gradient_of_the_reference(way: str, task: Any) -> None:
    error, name = worst_error(gradient_of(way, task), expected_gradient(task))
    assert error < 1e-9, name


@KINDS
@pytest.mark.parametrize("way", baselines.FIRST_ORDER)
def test_a_first_order_way_has_another_gradient(way: str, task: Any) -> None:
    got = gradient_of(way, task)
    assert worst_error(got, expected_gradient(task))[0] > 1e-2
    assert worst_error(got, expected_gradient(task, first_order=True))[0] < 1e-9


def test_the_ways_are_exact_first_order_and_the_floor() -> None:
    assert {*baselines.EXACT, *baselines.FIRST_ORDER, "ordinary"} == set(baselines.WAYS)


def test_a_way_adds_to_the_gradients_that_are_there(task: Any) -> None:
    for way in baselines.WAYS:
        once = gradient_of(way, task)
        with without_upcasts(task.model):
            baselines.WAYS[way](task)
        for name, parameter in task.model.named_parameters():
            torch.testing.assert_close(parameter.grad, 2 * once[name])


@pytest.mark.parametrize("task", ["lora-full"], indirect=True)
def test_no_way_makes_a_gradient_of_a_frozen_weight(task: Any) -> None:
    for step in baselines.WAYS.values():
        step(task)
        assert all(leaf.grad is None for n, leaf in task.inner.items() if n not in task.outer)
        assert all(weight.grad is not None for weight in task.trained)


def test_sequential_ways_hold_one_adapted_copy_and_the_others_all() -> None:
    case = cases.Case(cases.llama(64, 2, 4, 2, 192, 512), 6, 4, 6)
    model = cases.random_model(case, torch.device("cpu"), torch.float32)
    batch = cases.random_batch(case, torch.device("cpu"))
    task = baselines.LeanMAML(model, batch, cases.self_teacher(model, batch))
    one = sum(4 * p.numel() for p in model.parameters())
    peaks = {
        way: peak_bytes_over_model(model, functools.partial(step, task))
        for way, step in baselines.WAYS.items()
    }
    for way in ("sequential", "sequential first-order", "forward-over-reverse"):
        assert one < peaks[way] < case.examples * one, way
    for way in ("vmap", "all-alive"):
        assert peaks[way] > case.examples * one, way


@pytest.mark.parametrize("objective", ["kl", "gold"])
@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("step", [baselines.sequential, baselines.all_alive])
def test_what_a_plan_predicts_has_the_gradient_of_the_reference(
    step: Any,
    inner_steps: int,
    objective: str,
    tiny_model: Callable[..., nn.Module],
    make_batch: Callable[[str], MetaBatch],
) -> None:
    model, batch = tiny_model(), make_batch("one-each")
    teacher = teacher_of(model, batch) if objective == "kl" else None
    options = dict(inner_lr=INNER_LR, inner_steps=inner_steps)
    task = baselines.LeanMAML(model, batch, teacher, **options)
    with without_upcasts(model):
        _, got = gradients_of(lambda *_: step(task), model, batch)
        options |= dict(objective=objective, teacher=teacher)
        _, expected = gradients_of(reference_meta_step, model, batch, **options)
    assert worst_error(got, expected)[0] < 1e-9


def test_groups_of_several_are_refused(
    tiny_model: Callable[..., nn.Module], make_batch: Callable[[str], MetaBatch]
) -> None:
    model, batch = tiny_model(), make_batch("grouped")
    with pytest.raises(ValueError, match="one context and query per group"):
        baselines.LeanMAML(model, batch, teacher_of(model, batch))


# Sequential MAML of other libraries


def test_higher_has_the_gradient_of_the_reference(
    tiny_model: Callable[..., nn.Module], make_batch: Callable[[str], MetaBatch]
) -> None:
    higher = pytest.importorskip("higher", reason="higher is an optional cross-check")
    # It cannot patch Llama, which slices its list of layers.
    model, batch = tiny_model("gpt2-conv1d-positions"), make_batch("one-each")
    task = baselines.LeanMAML(model, batch, teacher_of(model, batch), inner_lr=INNER_LR)

    def step(*_: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=INNER_LR)
        for example in task:
            adapting = higher.innerloop_ctx(model, optimizer, copy_initial_weights=False)
            with adapting as (patched, inner_step), sdpa_kernel(SDPBackend.MATH):
                adapted = copy.copy(task)
                adapted.model = patched
                inner_step.step(adapted.inner_loss({}, example))
                (adapted.outer_loss({}, example) / len(task)).backward()

    assert worst_error(gradients_of(step, model, batch)[1], expected_gradient(task))[0] < 1e-9


def test_torchopt_has_the_gradient_of_the_reference(task: Any) -> None:
    torchopt = pytest.importorskip("torchopt", reason="TorchOpt is an optional cross-check")

    def step(*_: Any) -> None:
        start = torchopt.extract_state_dict(task.model, by="reference")
        for example in task:
            optimizer = torchopt.MetaSGD(task.model, lr=INNER_LR)
            with sdpa_kernel(SDPBackend.MATH):
                optimizer.step(task.inner_loss({}, example))
                loss = task.outer_loss({}, example) / len(task)
            torchopt.recover_state_dict(task.model, start)
            loss.backward()

    with without_upcasts(task.model):
        _, got = gradients_of(step, task.model, task.batch)
    assert worst_error(got, expected_gradient(task))[0] < 1e-9
