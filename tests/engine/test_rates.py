"""The inner rate as a tensor: of all groups, of each, of single layers; and its own gradient,
compared with autograd through materialised weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gdprompt_fast import MetaBatch
from gdprompt_fast.errors import UserError
from gdprompt_fast.models.inner_params import select_inner
from gdprompt_fast.ops.backend import use_backend
from gdprompt_fast.ops.phase import Phase
from gdprompt_fast.ops.vocabulary import NLLTarget
from gdprompt_fast.reference.compare import without_upcasts
from gdprompt_fast.rows import GroupedRows
from gdprompt_fast.update.adapted_layer import StepState
from gdprompt_fast.update.attach import AdaptedModel
from gdprompt_fast.update.masks import attention_by

Build = Callable[..., Any]
Rates = dict[str, Tensor]


def context_weight(batch: MetaBatch) -> Tensor:
    """Of every context token's next-token NLL in its group's inner loss, [C, Tc]."""
    weight = batch.context_loss_mask.roll(-1, 1).double()
    weight[:, -1] = 0
    share = torch.bincount(batch.context_group)[batch.context_group]
    return weight / (weight.sum(1) * share)[:, None]


def by_engine(
    model: nn.Module, batch: MetaBatch, eta: Tensor, rates: Rates, **options: Any
) -> Tensor:
    """The sum of the responses' NLL at θ', whose backward leaves all gradients in ``.grad``."""
    steps, inner_params, first_order = (options[n] for n in ("steps", "inner", "first_order"))
    state = StepState(batch.groups, eta, Phase(not first_order), rates=rates)
    adapted = AdaptedModel(model, select_inner(model, inner_params), state)
    with use_backend("torch"), adapted.differentiable(options.get("recompute", "none")):
        contexts = GroupedRows(batch.context_group, batch.groups)
        adapted.vocabulary.vocabulary.begin_contexts(batch.context_ids, contexts)
        for level in range(steps):
            hidden = adapted.hidden_states(batch.context_ids, contexts, level)
            nll_C = adapted.vocabulary.context_loss(hidden, context_weight(batch))
            adapted.inner_step(nll_C.sum(), retain_graph=False)
        queries = GroupedRows(batch.query_group, batch.groups)
        hidden = adapted.hidden_states(batch.query_ids, queries, steps)
        row, position = batch.response_mask.nonzero(as_tuple=True)
        tokens = GroupedRows(batch.query_group[row], batch.groups)
        target = NLLTarget(tokens.to_groups(batch.query_ids[row, position]))
        loss = adapted.vocabulary.response_loss(hidden[row, position - 1], target, tokens).sum()
        loss.backward()
        adapted.release()
    return loss.detach()


def by_autograd(
    model: nn.Module, batch: MetaBatch, eta: Tensor, rates: Rates, **options: Any
) -> Tensor:
    steps, inner_params, first_order = (options[n] for n in ("steps", "inner", "first_order"))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    weight_CT, total = context_weight(batch), torch.zeros(())
    for g in range(batch.groups):
        theta = {
            name: p if p.requires_grad else p.detach().requires_grad_()
            for name, p in select_inner(model, inner_params).items()
        }
        rows, queries = batch.context_group == g, batch.query_group == g
        for _ in range(steps):
            logits = functional_call(model, theta, batch.context_ids[rows]).logits
            ids = batch.context_ids[rows].roll(-1, 1)
            nll = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
            loss = (nll * weight_CT[rows]).sum()
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
            for (name, weight), gradient in zip(theta.items(), grads, strict=True):
                layer = name.rpartition(".")[0]
                layer = "lm_head" if tied and layer == "model.embed_tokens" else layer
                own = rates.get(layer, eta)
                theta[name] = weight - own.expand(batch.groups)[g] * gradient
        if not queries.any():
            continue
        logits = functional_call(model, theta, batch.query_ids[queries]).logits
        mask, ids = batch.response_mask[queries], batch.query_ids[queries]
        total = total + F.cross_entropy(logits[:, :-1][mask[:, 1:]], ids[mask], reduction="sum")
    total.backward()
    return total.detach()


def gradients(
    step: Callable[..., Tensor],
    model: nn.Module,
    batch: MetaBatch,
    eta: Tensor,
    rates: Rates,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and what every parameter and rate that requires it has in ``.grad``."""
    leaves = (
        dict(model.named_parameters()) | {"η": eta} | {f"η of {n}": r for n, r in rates.items()}
    )
    for leaf in leaves.values():
        leaf.grad = None
    loss = step(model, batch, eta, rates, **options)
    return loss, {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


def assert_exact(
    model: nn.Module, batch: MetaBatch, eta: Tensor, rates: Rates, **options: Any
) -> None:
    options = dict(steps=1, inner="full", first_order=False) | options
    with without_upcasts(model), attention_by(model, None):
        expected = gradients(by_autograd, model, batch, eta, rates, **options)
    got = gradients(by_engine, model, batch, eta, rates, **options)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-9, atol=0)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = float((got[1][name] - gradient).norm() / gradient.norm())
        assert error <= 1e-9, f"{name}: relative error {error:.1e}"


def rate(*values: float, learnt: bool = True) -> Tensor:
    eta = torch.tensor(values, dtype=torch.float64)
    return (eta[0] if len(values) == 1 else eta).clone().requires_grad_(learnt)


EACH = 0.1, 0.0, 0.07  # of every group: one stands still


@pytest.mark.parametrize("steps", [1, 2, 3], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize("values", [(0.1,), EACH], ids=["one-rate", "one-of-each-group"])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gpt2-conv1d-positions"])
def test_the_gradient_of_a_learnt_rate_is_exact(
    name: str, values: tuple[float, ...], steps: int, tiny_model: Build, make_batch: Build
) -> None:
    assert_exact(tiny_model(name), make_batch("one-each"), rate(*values), {}, steps=steps)


LAYERS = [
    "lm_head",
    "model.norm",
    "model.layers.0.input_layernorm",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
]


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("name", ["llama-tied", "llama-biases"])
def test_layers_may_have_rates_of_their_own(
    name: str, recompute: str, tiny_model: Build, make_batch: Build
) -> None:
    rates = {layer: rate(*(0.01 * (i + 1) * v for v in EACH)) for i, layer in enumerate(LAYERS)}
    rates |= {} if name == "llama-tied" else {"model.embed_tokens": rate(0.02)}
    options: dict[str, Any] = dict(steps=2, recompute=recompute)
    assert_exact(tiny_model(name), make_batch("grouped"), rate(*EACH), rates, **options)


@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize("inner", ["full", "lora"])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_rates_of_adapters_are_exact(
    recompute: str, inner: str, steps: int, lora_model: Build, make_batch: Build
) -> None:
    model = lora_model("llama-untied")
    layer = next(n for n, _ in model.named_modules() if n.endswith("q_proj.lora_B.default"))
    rates = {layer: rate(*EACH)} if inner == "lora" else {}
    options: dict[str, Any] = dict(steps=steps, inner=inner, recompute=recompute)
    assert_exact(model, make_batch("one-each"), rate(0.1), rates, **options)


@pytest.mark.parametrize("inner", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_the_gradient_of_a_learnt_rate_is_exact_in_first_order(
    name: str, inner: str, lora_model: Build, make_batch: Build
) -> None:
    model = lora_model(name).requires_grad_(True)
    options: dict[str, Any] = dict(first_order=True, steps=2, inner=inner)
    assert_exact(model, make_batch("grouped"), rate(*EACH), {}, **options)


def test_a_rate_can_be_learnt_where_all_weights_are_frozen(
    tiny_model: Build, make_batch: Build
) -> None:
    model = tiny_model("llama-untied")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    assert_exact(model, make_batch("grouped"), rate(0.1), {})


def test_a_rate_of_no_layer_is_an_error(tiny_model: Build) -> None:
    model = tiny_model()
    rates = {"model.layers.7": rate(0.1)}
    with pytest.raises(UserError, match=r"rates: expected names of layers .* got model\.layers\.7"):
        AdaptedModel(model, {}, StepState(1, 0.1, Phase(True), rates=rates))
