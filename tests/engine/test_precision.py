"""bf16: the dual form never rounds the update into the weights, and the step is as good as bf16
allows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdprompt_fast import fast_meta_step, inner_step, reference_meta_step
from gdprompt_fast.models.memory import PeakMemory, model_tensors
from gdprompt_fast.ops.linear import Factor, InnerLinear
from gdprompt_fast.ops.phase import Phase
from gdprompt_fast.ops.rate import Rate
from gdprompt_fast.reference.compare import Gradients, gradients_of, without_upcasts
from gdprompt_fast.rows import GroupedRows
from gdprompt_fast.update.adapted_layer import MaterialisedLayer
from helpers.models import MODELS, VOCABULARY, llama

Build = Callable[..., Any]
each_model = pytest.mark.parametrize(
    ("name", "steps"), [(name, steps) for name in MODELS for steps in (1, 2)]
)
OPTIONS: dict[str, Any] = dict(objective="gold", inner_lr=0.05, lm_weight=0.2)


def whole_error(got: Gradients, exact: Gradients) -> float:
    """‖got − exact‖ / ‖exact‖ over all tensors together."""
    difference = torch.stack([(got[n].double() - g).norm() for n, g in exact.items()]).norm()
    return float(difference / torch.stack([g.norm() for g in exact.values()]).norm())


def errors(
    fast: Gradients, in_bf16: torch.nn.Module, model: torch.nn.Module, batch: Any, **options: Any
) -> tuple[float, float]:
    """Of the step's gradients, and of the reference's in bf16, from the model's in fp64."""
    _, plain = gradients_of(reference_meta_step, in_bf16, batch, **options)
    model = model.double()
    with without_upcasts(model):
        _, exact = gradients_of(reference_meta_step, model, batch, **options)
    return whole_error(fast, exact), whole_error(plain, exact)


@each_model
def test_in_bf16_the_step_is_at_most_twice_as_far_from_fp64_as_the_reference(
    name: str, steps: int, tiny_model: Build, make_batch: Build
) -> None:
    # rounded once, so that all three start from the same weights
    model, batch = tiny_model(name).bfloat16(), make_batch("grouped")
    options = OPTIONS | dict(inner_steps=steps)
    _, fast = gradients_of(fast_meta_step, model, batch, **options)
    ours, eager = errors(fast, model, model, batch, **options)
    assert ours <= 2 * eager + 1e-2, f"error {ours:.1e}, of the reference in bf16 {eager:.1e}"


@each_model
def test_under_autocast_fp32_weights_get_the_gradient_of_bf16_products(
    name: str, steps: int, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(name).float(), make_batch("grouped")
    options = OPTIONS | dict(inner_steps=steps)
    with torch.autocast("cpu", torch.bfloat16):
        _, fast = gradients_of(fast_meta_step, model, batch, **options)
    assert {g.dtype for g in fast.values()} == {torch.float32}
    ours, eager = errors(fast, copy.deepcopy(model).bfloat16(), model, batch, **options)
    assert ours > 1e-4, "the products were not in bf16"
    assert ours <= 2 * eager, f"error {ours:.1e}, of the reference in bf16 {eager:.1e}"


@pytest.mark.parametrize("inner_params", ["full", "lora"])
def test_under_autocast_adapters_do_not_widen_what_they_read(
    inner_params: str, lora_model: Build, make_batch: Build
) -> None:
    model, batch = lora_model("llama-tied").float(), make_batch()
    options: dict[str, Any] = dict(objective="gold", inner_lr=0.05, inner_params=inner_params)
    wide: set[int] = set()

    def watch(tensor: torch.Tensor) -> None:
        if tensor.dtype == torch.float32 and tensor.shape[:-1] == batch.context_ids.shape:
            wide.add(tensor.shape[-1])

    with torch.autocast("cpu", torch.bfloat16), PeakMemory(model_tensors(model), on_new=watch):
        fast_meta_step(model, batch, **options)
    assert model.config.hidden_size in wide  # the head's sums
    assert model.config.intermediate_size not in wide
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        _, fast = gradients_of(fast_meta_step, model, batch, **options)
    assert {g.dtype for g in fast.values()} == {torch.float32}
    ours, eager = errors(fast, copy.deepcopy(model).bfloat16(), model, batch, **options)
    assert ours <= 2 * eager, f"error {ours:.1e}, of the reference in bf16 {eager:.1e}"


def change_errors(dtype: torch.dtype) -> tuple[float, float]:
    """Relative errors of the change y' − y of a layer's output at η = 1e-3: in dual form, and with
    the weights rounded to ``dtype`` after the update. Weights, inputs and cotangents as a 2048-wide
    Llama's.
    """
    torch.manual_seed(0)
    groups, tokens, width = 2, 32, 512
    weight = (0.02 * torch.randn(width, width)).to(dtype)
    x_context, x_query = (torch.randn(groups, tokens, width).to(dtype) for _ in range(2))
    e_context = (0.01 * torch.randn(groups, tokens, width)).to(dtype)
    layer = InnerLinear(
        weight,
        None,
        inner_weight=True,
        inner_bias=False,
        rate=Rate(torch.full((groups,), 1e-3)),
        phase=Phase(second_order=False),
        weight_gradient=None,
        bias_gradient=None,
    )
    layer.factors.append(Factor(x_context, e_context))
    rows = GroupedRows(torch.arange(groups), groups)
    change = torch.zeros(groups, tokens, width, dtype=dtype)
    layer.weight_OI = torch.zeros_like(weight)  # only the update's share of the output
    change = layer.product(x_query, rows, level=1)
    update = e_context.double().transpose(1, 2) @ x_context.double()
    exact = -1e-3 * x_query.double() @ update.transpose(1, 2)
    rounded = (weight.double() - 1e-3 * update).to(dtype).double() - weight.double()
    materialised = x_query.double() @ rounded.transpose(1, 2)
    return (
        float((change.double() - exact).norm() / exact.norm()),
        float((materialised - exact).norm() / exact.norm()),
    )


def test_the_dual_form_keeps_an_update_that_rounding_into_bf16_weights_loses() -> None:
    dual, rounded = change_errors(torch.bfloat16)
    assert dual < 0.01, f"the dual form's change is off by {dual:.1%}"
    assert rounded > 10 * dual, f"rounded weights: {rounded:.1%}, dual form: {dual:.1%}"


def test_an_update_under_autocast_is_applied_in_bf16(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model("llama-tied").float(), make_batch()

    def logits() -> torch.Tensor:
        update = inner_step(model, batch.context_ids, batch.context_mask, inner_lr=0.1)
        with update.applied_to(model, groups=torch.arange(3)), torch.no_grad():
            return model(input_ids=batch.query_ids).logits

    exact = logits()
    with torch.autocast("cpu", torch.bfloat16):
        got = logits()
    assert got.dtype == torch.bfloat16
    assert 1e-4 < float((got - exact).norm() / exact.norm()) < 5e-2


@pytest.mark.parametrize("kind", ["norms", "adapters"])
def test_small_parameters_keep_their_update_in_bf16_too(
    kind: str, tiny_model: Build, lora_model: Build, make_batch: Build
) -> None:
    chosen = "norm" if kind == "norms" else "lora_"
    build = tiny_model if kind == "norms" else lora_model
    model, batch = build("llama-tied").bfloat16(), make_batch()

    def change(inner_lr: float) -> torch.Tensor:
        update = inner_step(
            model,
            batch.context_ids,
            batch.context_mask,
            inner_lr=inner_lr,
            inner_params=lambda name, _: chosen in name,
        )
        pairs = [
            (moved, getattr(module, name))
            for module, adapted_layer in update.adapted.adapted_layers.items()
            if isinstance(adapted_layer, MaterialisedLayer)
            for moved, name in zip(adapted_layer.moved, adapted_layer.names, strict=False)
        ]
        return torch.cat([(moved - weight.float()).flatten() for moved, weight in pairs]).detach()

    small, large = change(1e-4), change(1e-2)
    assert large.abs().max() > 0
    torch.testing.assert_close(100 * small, large, rtol=1e-2, atol=1e-2 * float(large.abs().max()))


def test_an_adapted_bf16_model_runs(make_batch: Build) -> None:
    model = llama(VOCABULARY, initializer_range=0.02).bfloat16()
    batch = make_batch()
    update = inner_step(model, batch.context_ids, batch.context_mask, inner_lr=0.1)
    with update.applied_to(model, groups=torch.arange(3)):
        logits = model(input_ids=batch.query_ids).logits
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_inside_applied_to_is_near_what_float32_gives(
    name: str, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(name).float(), make_batch()
    update = inner_step(model, batch.context_ids, batch.context_mask, inner_lr=0.1)
    with torch.no_grad(), bf16():
        unadapted = model(batch.query_ids).logits.float()
    with update.applied_to(model, torch.arange(3)):
        right = model(batch.query_ids).logits
        with bf16():
            logits = model(batch.query_ids).logits
    assert logits.dtype == torch.bfloat16
    error = float((logits.float() - right).norm())
    assert error < 0.05 * float(right.norm())
    assert error < 0.2 * float((unadapted - right).norm())


def prepared(model: Any) -> Any:
    """By accelerate, as a training script prepares it."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is an optional dependency")
    accelerate.state.AcceleratorState._reset_state(True)  # of another test in this process
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model).eval()


def decorated(model: Any) -> Any:
    model.forward = bf16()(model.forward)
    return model


@pytest.mark.parametrize("prepare", [prepared, decorated], ids=lambda f: f.__name__)
def test_a_model_whose_forward_is_under_autocast_is_computed_with_in_bf16(
    prepare: Callable[[Any], Any], tiny_model: Build, make_batch: Build
) -> None:
    batch, options = make_batch(), dict(objective="gold", inner_lr=0.1, lm_weight=0.2)
    with bf16():
        _, expected = gradients_of(fast_meta_step, tiny_model().float(), batch, **options)
    model = prepare(tiny_model().float())
    _, got = gradients_of(fast_meta_step, model, batch, **options)
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    update = inner_step(model, batch.context_ids, batch.context_mask, inner_lr=0.1)
    with update.applied_to(model, torch.arange(3)):
        assert model(batch.query_ids).logits.isfinite().all()


def test_autocast_held_open_across_updates_does_not_go_on_with_old_weights(
    tiny_model: Build, make_batch: Build
) -> None:
    batch = make_batch()

    def trained(held: bool) -> tuple[Any, torch.Tensor]:
        model = tiny_model().float()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        with torch.autocast("cpu", torch.bfloat16, enabled=held):
            for _ in range(3):
                with bf16():
                    fast_meta_step(model, batch, objective="gold", inner_lr=0.1)
                    with torch.no_grad():
                        model(batch.query_ids)  # fills the cache of cast weights
                optimizer.step()
                optimizer.zero_grad()
            with bf16():
                update = inner_step(model, batch.context_ids, batch.context_mask, inner_lr=0.1)
                with update.applied_to(model, torch.arange(3)):
                    logits = model(batch.query_ids).logits
        return model, logits

    (held, held_logits), (closed, logits) = trained(True), trained(False)
    for one, other in zip(held.parameters(), closed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(held_logits, logits)
