"""A planted fault for each way of computing wrongly: refused, or found by ``check_exactness``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gdprompt_fast import MetaBatch, check_exactness
from gdprompt_fast.errors import UserError
from gdprompt_fast.layout import Layout
from gdprompt_fast.meta import compute, step
from gdprompt_fast.meta import inner as meta_inner
from gdprompt_fast.ops import attention, embedding, gradient, linear, lora, phase
from gdprompt_fast.ops.eager import attention as eager_attention
from gdprompt_fast.ops.eager import gelu, norm, rotary, swiglu
from gdprompt_fast.ops.vocabulary import functions
from gdprompt_fast.rows import GroupedRows
from gdprompt_fast.update import attach, recompute, substitutes
from gdprompt_fast.update.adapted_layer import StepState
from gdprompt_fast.update.linear import AdaptedLinear

Build = Callable[..., Any]
Patch = pytest.MonkeyPatch
OPTIONS: dict[str, Any] = dict(inner_lr=0.1, objective="gold", lm_weight=0.3, backend="torch")


def changes(place: Any, name: str, change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Plants a fault in what a function of the engine returns."""

    def plant(patch: Patch) -> None:
        own = getattr(place, name)
        patch.setattr(place, name, lambda *args, **kwargs: change(own(*args, **kwargs)))

    return plant


def of_tuple(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda found: tuple(change(t) if i == index else t for i, t in enumerate(found))


def first_order_only(patch: Patch) -> None:
    own = phase.Phase
    for place in (compute, meta_inner):
        patch.setattr(place, "Phase", lambda second_order: own(False))


def scaled_inner_lr(patch: Patch) -> None:
    own = StepState.__init__

    def init(self: Any, groups: int, inner_lr: float, *rest: Any, **named: Any) -> None:
        own(self, groups, 1.01 * inner_lr, *rest, **named)

    patch.setattr(StepState, "__init__", init)


def changed_queries(change: Callable[[MetaBatch], Layout]) -> Callable[[Patch], None]:
    """The outer loss is taken on a batch with another layout."""

    def plant(patch: Patch) -> None:
        def loss(adapted: Any, batch: MetaBatch, *rest: Any) -> Tensor:
            layout = change(batch)
            return own(adapted, batch._like(vars_of(batch), layout, batch.host), *rest)

        own = compute.query_loss
        patch.setattr(compute, "query_loss", loss)

    return plant


def vars_of(batch: MetaBatch) -> dict[str, Tensor]:
    return {field.name: getattr(batch, field.name) for field in fields(batch)}


def without_the_first_query(batch: MetaBatch) -> Layout:
    weight = batch.layout.weight_S.clone()
    weight[batch.layout.position_S < batch.query_ids.shape[1]] = 0
    return replace(batch.layout, weight_S=weight)


def at_the_neighbour(batch: MetaBatch) -> Layout:
    """Queries are answered at their neighbour's θ'."""
    return replace(
        batch.layout, queries=GroupedRows(batch.query_group.roll(1), batch.layout.shape.groups)
    )


def stale_weights(patch: Patch) -> None:
    """A layer's weights are kept from one step to the next."""
    kept: dict[tuple[int, torch.dtype], Tensor] = {}
    own = AdaptedLinear.__init__

    def init(self: Any, module: Any, *rest: Any, **options: Any) -> None:
        own(self, module, *rest, **options)
        weight = self.layer.weight_OI
        self.layer.weight_OI = kept.setdefault((id(module), weight.dtype), weight.clone())

    patch.setattr(AdaptedLinear, "__init__", init)


def unweighted_contexts(patch: Patch) -> None:
    def contexts(batch: MetaBatch) -> Any:
        found = own(batch)
        weight = found.weight_CT
        return found._replace(weight_CT=(weight > 0) * weight.max())

    own = compute.contexts_of
    patch.setattr(compute, "contexts_of", contexts)


def dropped_bias(patch: Patch) -> None:
    own = linear.InnerLinear.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **{**kwargs, "inner_bias": False})

    patch.setattr(linear.InnerLinear, "__init__", init)


def no_factor_cotangents(patch: Patch) -> None:
    patch.setattr(linear.InnerLinear, "factor_cotangents", lambda self, factor, x, e: (x, e))


def no_cotangents_of_inputs(patch: Patch) -> None:
    own = linear.InnerLinear.factor_cotangents
    patch.setattr(
        linear.InnerLinear, "factor_cotangents", lambda self, *args: (None, own(self, *args)[1])
    )


ZERO = torch.zeros_like
# name of a model of ``MODELS``, and what is planted in the engine
ENGINE: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "the second-order term is dropped": ("llama-tied", first_order_only),
    "the inner rate is off by 1 %": ("llama-tied", scaled_inner_lr),
    "a query is dropped": ("llama-tied", changed_queries(without_the_first_query)),
    "queries are answered at another group's weights": (
        "llama-tied",
        changed_queries(at_the_neighbour),
    ),
    "weights are those of an earlier step": ("llama-untied", stale_weights),
    "contexts are not averaged by their lengths": ("llama-tied", unweighted_contexts),
    "biases do not move": ("llama-biases", dropped_bias),
    "factors get no cotangents": ("llama-untied", no_factor_cotangents),
    "inputs of the context get no cotangents from its factors": (
        "llama-untied",
        no_cotangents_of_inputs,
    ),
    "attention's double backward forgets the queries": (
        "llama-tied",
        changes(eager_attention, "attention_double_backward", of_tuple(1, ZERO)),
    ),
    "attention's double backward forgets the values": (
        "llama-tied",
        changes(eager_attention, "attention_double_backward", of_tuple(3, ZERO)),
    ),
    "attention's backward is off by 1 %": (
        "llama-tied",
        changes(eager_attention, "attention_backward", of_tuple(0, lambda t: 1.01 * t)),
    ),
    "attention is not within its window": (
        "mistral-sliding-window",
        changes(attention, "visible_keys", lambda _: None),
    ),
    "a norm's double backward forgets its weight": (
        "llama-tied",
        changes(norm, "norm_double_backward", of_tuple(2, ZERO)),
    ),
    "a norm's epsilon is forgotten": (
        "llama-tied",
        lambda patch: patch.setattr(
            norm,
            "norm_forward",
            lambda x, w, b, eps, c, own=norm.norm_forward: own(x, w, b, 0.1, c),
        ),
    ),
    "a layer norm's double backward has the sign wrong": (
        "gpt2-conv1d-positions",
        changes(norm, "norm_double_backward", of_tuple(1, torch.neg)),
    ),
    "SwiGLU's double backward forgets the gate": (
        "llama-tied",
        changes(swiglu, "swiglu_double_backward", of_tuple(1, ZERO)),
    ),
    "GELU's second derivative is missing": (
        "gpt2-conv1d-positions",
        changes(gelu, "gelu_double_backward", of_tuple(1, ZERO)),
    ),
    "rotation is undone by itself": (
        "llama-tied",
        lambda patch: patch.setattr(rotary, "rotary_backward", rotary.rotary_forward),
    ),
    "λ is forgotten": (
        "llama-tied",
        changes(compute, "take_inner_steps", lambda found: (found[0].detach(), found[1])),
    ),
    "the tied embedding's lookups get no cotangents": (
        "llama-tied",
        changes(functions, "lookup_cotangent", ZERO),
    ),
    "the head does not move": (
        "llama-untied",
        lambda patch: patch.setattr(
            attach,
            "AdaptedVocabulary",
            lambda head, tokens, inner, *rest, own=attach.AdaptedVocabulary: own(
                head, tokens, False, *rest
            ),
        ),
    ),
    "a table's lookups get no cotangents": (
        "llama-untied",
        lambda patch: patch.setattr(
            embedding.InnerEmbedding, "factor_cotangents", lambda *_: (None, [None])
        ),
    ),
    "rows of a gradient overwrite each other": (
        "llama-untied",
        lambda patch: patch.setattr(
            gradient.WeightGradient,
            "add_rows",
            lambda self, index, rows: self._buffer().index_put_(
                (index,), rows.to(self._parameter.dtype)
            ),
        ),
    ),
    "a weight's later products are dropped": (
        "gpt2-conv1d-positions",
        lambda patch: patch.setattr(gradient, "_add_product_", lambda *_: None),
    ),
    "the wrong scale of attention": (
        "llama-tied",
        lambda patch: patch.setattr(
            substitutes,
            "attention",
            lambda q, k, v, scale, window, own=substitutes.attention: own(
                q, k, v, scale=1.1 * scale, window=window
            ),
        ),
    ),
}


EXACT: set[str] = set()  # the models for which that has been shown


@pytest.mark.parametrize("fault", ENGINE)
def test_a_fault_in_the_engine_is_found(
    fault: str, tiny_model: Build, make_batch: Build, monkeypatch: Patch
) -> None:
    name, plant = ENGINE[fault]
    model, batch = tiny_model(name), make_batch("grouped" if "group" in fault else "one-each")
    batch.query_ids[:3, :3] = batch.context_ids[:3, :3]  # queries are about their contexts
    if name not in EXACT:  # without the fault
        assert check_exactness(model, batch, **OPTIONS).exact
        EXACT.add(name)
    plant(monkeypatch)
    if plant is stale_weights:
        step.fast_meta_step(model, batch, **OPTIONS)
        model.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    try:
        report = check_exactness(model, batch, **OPTIONS)
    except UserError as refusal:
        assert "its own forward computes" in str(refusal)
    else:
        assert report.verdict == "not exact", report.table()


def test_a_fault_in_recomputation_is_found(
    tiny_model: Build, make_batch: Build, monkeypatch: Patch
) -> None:
    own = recompute.BlockUse.double_backward

    def forgetful(self: Any, *args: Any) -> Any:
        e, h, *inputs = own(self, *args)
        return e, torch.zeros_like(h), *inputs

    monkeypatch.setattr(recompute.BlockUse, "double_backward", forgetful)
    report = check_exactness(tiny_model(), make_batch(), **OPTIONS, recompute="block")
    assert report.verdict == "not exact"


def test_a_fault_in_an_adapters_inner_step_is_found(
    lora_model: Build, make_batch: Build, monkeypatch: Patch
) -> None:
    own = lora.lora_materialise
    monkeypatch.setattr(
        lora, "lora_materialise", lambda w, e, x, rows, scale: own(w, e, x, rows, 1.01 * scale)
    )
    report = check_exactness(lora_model(), make_batch(), **OPTIONS, inner_params="lora")
    assert report.verdict == "not exact"
