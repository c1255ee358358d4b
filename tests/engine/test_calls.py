"""What goes into a step and what it leaves: sums of calls, padding, teachers, hooks, memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gdprompt_fast import MetaBatch, TeacherTargets, fast_meta_step, reference_meta_step
from gdprompt_fast.reference.compare import gradients_of, worst_error
from helpers.models import random_teacher

pytestmark = pytest.mark.quick

Build = Callable[..., Any]


def test_two_calls_add_up_as_two_backward_calls(tiny_model: Build, make_batch: Build) -> None:
    model, batches = (
        tiny_model("llama-tied"),
        [make_batch("one-each"), make_batch("grouped", seed=5)],
    )
    options: dict[str, Any] = dict(objective="gold", inner_lr=0.1, lm_weight=0.2)
    separate = [gradients_of(fast_meta_step, model, batch, **options)[1] for batch in batches]
    model.zero_grad()
    for batch in batches:
        fast_meta_step(model, batch, **options)
    added = {name: p.grad for name, p in model.named_parameters()}
    error, name = worst_error(added, {n: separate[0][n] + separate[1][n] for n in added})
    assert error <= 1e-12, f"{name}: relative error {error:.1e}"


def test_a_batch_of_three_equals_three_batches_of_one(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model("llama-tied"), make_batch("one-each")
    options: dict[str, Any] = dict(objective="gold", inner_lr=0.1)
    _, together = gradients_of(fast_meta_step, model, batch, **options)
    model.zero_grad()
    for row in range(3):
        one = MetaBatch(
            *(getattr(batch, f)[row : row + 1] for f in ("context_ids", "context_mask")),
            *(
                getattr(batch, f)[row : row + 1]
                for f in ("query_ids", "query_mask", "response_mask")
            ),
        )
        fast_meta_step(model, one, **options)
    separate = {name: p.grad / 3 for name, p in model.named_parameters()}
    error, name = worst_error(together, separate)
    assert error <= 1e-12, f"{name}: relative error {error:.1e}"


def test_padding_changes_nothing(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model("llama-tied"), make_batch("one-each")
    options: dict[str, Any] = dict(objective="gold", inner_lr=0.1)
    _, expected = gradients_of(fast_meta_step, model, batch, **options)
    context_ids, query_ids = batch.context_ids.clone(), batch.query_ids.clone()
    context_ids[~batch.context_mask] = 3
    query_ids[~batch.query_mask] = 4
    other = MetaBatch(
        context_ids, batch.context_mask, query_ids, batch.query_mask, batch.response_mask
    )
    _, gradients = gradients_of(fast_meta_step, model, other, **options)
    error, name = worst_error(gradients, expected)
    assert error <= 1e-12, f"{name}: relative error {error:.1e}"


def test_a_teacher_of_another_precision_gives_the_same_gradient(
    tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model("llama-tied", torch.float32), make_batch()
    teacher = random_teacher(batch)
    _, double = gradients_of(fast_meta_step, model, batch, teacher=teacher)
    single = TeacherTargets.from_logits(teacher.materialised_logits().float())
    _, expected = gradients_of(fast_meta_step, model, batch, teacher=single)
    error, name = worst_error(double, expected)
    assert error <= 1e-4, f"{name}: relative error {error:.1e}"


def test_a_teacher_may_rule_tokens_out(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model("llama-tied"), make_batch()
    out = fast_meta_step(model, batch, teacher=random_teacher(batch, ruled_out=slice(5, 9)))
    assert torch.isfinite(out.outer_loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradient_hooks_see_every_step(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model(), make_batch()
    weight = model.model.layers[0].mlp.up_proj.weight
    _, expected = gradients_of(fast_meta_step, model, batch, objective="gold")
    model.zero_grad()
    weight.register_hook(lambda g: 2 * g)
    for _ in range(2):
        fast_meta_step(model, batch, objective="gold")
    torch.testing.assert_close(weight.grad, 4 * expected["model.layers.0.mlp.up_proj.weight"])


def test_hooks_after_a_gradient_see_every_step(tiny_model: Build, make_batch: Build) -> None:
    model, batch, seen = tiny_model(), make_batch(), []
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for _ in range(2):
        fast_meta_step(model, batch, objective="gold")
        weight.grad.zero_()
    torch.testing.assert_close(seen[0], seen[1])


def tanh_before(layer: Any) -> None:
    layer.lora_B.default.register_forward_pre_hook(lambda _, inputs: (inputs[0].tanh(),))


def clamp_after(layer: Any) -> None:
    layer.lora_B.default.register_forward_hook(lambda _, __, y: y.clamp(-0.3, 0.3))


def tanh_as_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Tanh()


@pytest.mark.parametrize("inner_params", ["full", "lora"])
@pytest.mark.parametrize("change", [tanh_before, clamp_after, tanh_as_dropout])
def test_what_is_changed_in_an_adapter_is_run(
    change: Any, inner_params: str, lora_model: Build, make_batch: Build
) -> None:
    """Where B is zero at first, as in a new adapter, the look at the first step sees none of it."""
    model, batch = lora_model("llama-untied"), make_batch()
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    values = [layer.lora_B.default.weight.detach().clone() for layer in layers]
    options: dict[str, Any] = dict(objective="gold", inner_lr=0.1, inner_params=inner_params)
    for layer in layers:
        change(layer)
        layer.lora_B.default.weight.data.zero_()
    fast_meta_step(model, batch, **options)
    for layer, value in zip(layers, values, strict=True):
        layer.lora_B.default.weight.data.copy_(value)
    _, exact = gradients_of(reference_meta_step, model, batch, **options)
    _, got = gradients_of(fast_meta_step, model, batch, **options)
    assert worst_error(got, exact)[0] < 1e-4


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_hook_that_reads_the_mask_gets_the_models_own(
    recompute: str, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model("llama-untied"), make_batch()

    def prefer_near(_: Any, args: Any, kwargs: Any) -> Any:
        assert kwargs["attention_mask"] is None
        index = torch.arange(kwargs["hidden_states"].shape[1])
        distance = index[:, None] - index
        bias = torch.where(distance < 0, -torch.inf, -0.3 * distance).to(model.dtype)
        return args, kwargs | {"attention_mask": bias[None, None]}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(prefer_near, with_kwargs=True)
    options: dict[str, Any] = dict(objective="gold", inner_lr=0.1)
    _, exact = gradients_of(reference_meta_step, model, batch, **options)
    _, got = gradients_of(fast_meta_step, model, batch, recompute=recompute, **options)
    assert worst_error(got, exact)[0] < 1e-4


def test_nothing_stays_alive_after_a_step(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model("llama-tied"), make_batch()

    def live_tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    counts = []
    for _ in range(4):
        fast_meta_step(model, batch, objective="gold", inner_lr=0.1, inner_steps=2, lm_weight=0.1)
        counts.append(live_tensors())
    assert len(set(counts[1:])) == 1, f"live tensors after each step: {counts}"
