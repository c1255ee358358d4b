"""Layers with inner updates in factors, against weights materialised in fp64: their gradient is
autograd's through the inner step.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdprompt_fast.models.memory import PeakMemory
from gdprompt_fast.ops.embedding import InnerEmbedding, inner_embedding
from gdprompt_fast.ops.gradient import WeightGradient
from gdprompt_fast.ops.handle import depend_on, weight_handle
from gdprompt_fast.ops.inner_linear import inner_linear
from gdprompt_fast.ops.linear import InnerLinear
from gdprompt_fast.ops.phase import Phase
from gdprompt_fast.rows import GroupedRows
from helpers.materialised import (
    assert_same_value_and_gradients,
    leaf,
    materialised_linear,
    rate,
)

pytestmark = pytest.mark.quick


def inner_linear_twice(
    x_context: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_query: Tensor,
    groups: list[Tensor],
    steps: int,
) -> Tensor:
    """Inner steps of a nonlinear loss at one linear layer, then a query at the weights they
    make.
    """
    contexts, queries = (GroupedRows(group, 3) for group in groups)
    phase = Phase(second_order=True)
    weight_gradient, bias_gradient = WeightGradient(weight), WeightGradient(bias)
    layer = InnerLinear(
        weight.detach(),
        bias.detach(),
        inner_weight=True,
        inner_bias=True,
        rate=rate(3),
        phase=phase,
        weight_gradient=weight_gradient,
        bias_gradient=bias_gradient,
    )
    handle = weight_handle((weight, weight_gradient), (bias, bias_gradient))
    for level in range(steps):
        y = inner_linear(x_context, handle, layer, contexts, level)
        with phase.inner():
            (gradient,) = torch.autograd.grad(y.sin().sum(), handle, create_graph=True)
        handle = depend_on(handle, gradient)
    return inner_linear(x_query, handle, layer, queries, steps)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("tokens", [(2, 3), (9, 7)], ids=["few-tokens", "many-tokens"])
@pytest.mark.parametrize(
    "groups",
    [([0, 1, 2], [0, 1, 2]), ([2, 0, 0, 1], [1, 1, 0, 2, 1]), ([0, 1, 2], [2])],
    ids=["one-each", "ragged", "groups-without-queries"],
)
def test_inner_linear_equals_materialised_weights_and_its_double_backward_is_right(
    groups: tuple[list[int], list[int]], tokens: tuple[int, int], steps: int
) -> None:
    group = [torch.tensor(g) for g in groups]
    inputs = (
        leaf(len(groups[0]), tokens[0], 3),
        leaf(4, 3),
        leaf(4),
        leaf(len(groups[1]), tokens[1], 3),
    )
    assert_same_value_and_gradients(
        lambda *x: inner_linear_twice(*x, group, steps),
        lambda *x: materialised_linear(*x, group, steps),
        inputs,
    )


@pytest.mark.parametrize("tokens", [4, 64], ids=["few-tokens", "many-tokens"])
def test_the_update_is_applied_in_the_order_of_the_fewest_products(tokens: int) -> None:
    groups, inputs, outputs = 3, 16, 24
    layer = InnerLinear(
        torch.randn(outputs, inputs),
        None,
        inner_weight=True,
        inner_bias=False,
        rate=rate(groups),
        phase=Phase(second_order=True),
        weight_gradient=None,
        bias_gradient=None,
    )
    rows = GroupedRows(torch.arange(groups), groups)
    x = torch.randn(groups, tokens, inputs)
    layer.record(x, torch.randn(groups, tokens, outputs), level=0)
    shapes = set()
    with PeakMemory([x, layer.weight_OI], on_new=lambda t: shapes.add(tuple(t.shape))):
        layer.product(x, rows, level=1)
    through_tokens, through_weight = (groups, tokens, tokens), (inputs, outputs)
    few = tokens * (inputs + outputs) < 2 * inputs * outputs
    assert (through_tokens in shapes, through_weight in shapes) == (few, not few)
    assert (groups, *through_weight) not in shapes, "the updates of several groups at once"


def inner_embedding_once(table: Tensor, ids: list[Tensor], groups: list[Tensor]) -> Tensor:
    contexts, queries = (GroupedRows(group, 2) for group in groups)
    phase, gradient = Phase(second_order=True), WeightGradient(table)
    layer = InnerEmbedding(
        table.detach(), padding_idx=0, inner=True, rate=rate(2), phase=phase, gradient=gradient
    )
    handle = weight_handle((table, gradient))
    y = inner_embedding(ids[0], handle, layer, contexts, 0)
    with phase.inner():
        (step,) = torch.autograd.grad(y.sin().sum(), handle, create_graph=True)
    return inner_embedding(ids[1], depend_on(handle, step), layer, queries, 1)


def test_inner_embedding_equals_a_materialised_table_and_its_double_backward_is_right() -> None:
    ids = [torch.tensor([[1, 2, 1], [0, 3, 2]]), torch.tensor([[1, 0], [2, 3], [4, 1]])]
    groups = [torch.tensor([0, 1]), torch.tensor([1, 1, 0])]
    table = leaf(5, 3)

    def plain(table: Tensor) -> Tensor:
        rows = []
        for row, g in enumerate(groups[1]):
            loss = F.embedding(ids[0][groups[0] == g], table, padding_idx=0).sin().sum()
            (step,) = torch.autograd.grad(loss, table, create_graph=True)
            rows.append(F.embedding(ids[1][row], table - 0.3 * step, padding_idx=0))
        return torch.stack(rows)

    assert_same_value_and_gradients(
        lambda table: inner_embedding_once(table, ids, groups), plain, (table,)
    )


def test_a_use_outside_an_inner_step_raises_under_create_graph() -> None:
    weight, x = leaf(4, 3), leaf(1, 2, 3)
    gradient = WeightGradient(weight)
    layer = InnerLinear(
        weight.detach(),
        None,
        inner_weight=True,
        inner_bias=False,
        rate=rate(1),
        phase=Phase(second_order=True),
        weight_gradient=gradient,
        bias_gradient=None,
    )
    y = inner_linear(
        x, weight_handle((weight, gradient)), layer, GroupedRows(torch.tensor([0]), 1), 0
    )
    with pytest.raises(
        RuntimeError, match="inner_linear is differentiable once outside an inner step only"
    ):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("transposed", [False, True], ids=["weight-OI", "weight-IO"])
@pytest.mark.parametrize(("tokens", "products"), [(3, 1), (30, 2)], ids=["few", "many"])
def test_a_waiting_product_joins_the_next_where_the_tokens_are_few(
    tokens: int, products: int, transposed: bool
) -> None:
    f, u = torch.randn(2, tokens, 20), torch.randn(2, tokens, 30)
    weight = torch.zeros(30, 20) if transposed else torch.zeros(20, 30)
    weight.grad = torch.ones_like(weight)
    gradient = WeightGradient(weight, transposed)
    with torch.profiler.profile() as profile:
        gradient.add_product(f[0], u[0], wait=True)
        gradient.add_product(f[1], u[1])
    assert gradient.take() is None
    expected = torch.einsum("kno,kni->oi", f, u)
    torch.testing.assert_close(weight.grad, 1 + (expected.T if transposed else expected))
    assert sum(event.name == "aten::addmm_" for event in profile.events()) == products


def test_a_product_that_waits_is_not_lost_at_the_end() -> None:
    weight, f, u = torch.zeros(4, 5), torch.randn(2, 4), torch.randn(2, 5)
    gradient = WeightGradient(weight)
    gradient.add_product(f, u, wait=True)
    torch.testing.assert_close(gradient.take(), f.T @ u)
