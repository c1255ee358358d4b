"""Low-rank weights with inner updates, by finite differences and against weights materialised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from gdprompt_fast.ops.lora import lora_materialise, lora_product
from gdprompt_fast.rows import GroupedRows
from helpers.materialised import (
    assert_same_value_and_gradients,
    leaf,
    materialised_linear,
    rate,
)

pytestmark = pytest.mark.quick

RAGGED = GroupedRows(torch.tensor([2, 0, 2, 2]), 3)  # group 1 has no rows


@pytest.mark.parametrize("shape", [(3, 5, 1), (1, 1, 4), (2, 3, 3)], ids=str)
def test_lora_product_equals_pytorch_and_is_twice_differentiable(shape: tuple[int, ...]) -> None:
    tokens, inputs, outputs = shape
    x, own, weight = leaf(4, tokens, inputs), leaf(3, outputs, inputs), leaf(outputs, inputs)

    def op(x: Tensor, own: Tensor) -> Tensor:
        return lora_product(x, weight.detach(), own, RAGGED)

    expected = torch.einsum("bti,boi->bto", x, own[RAGGED.group_B])
    torch.testing.assert_close(op(x, own), expected)
    assert gradcheck(op, (x, own))
    assert gradgradcheck(op, (x, own))


@pytest.mark.parametrize("shape", [(3, 5, 1), (1, 1, 4), (2, 3, 3)], ids=str)
def test_lora_materialise_equals_pytorch_and_is_twice_differentiable(
    shape: tuple[int, ...],
) -> None:
    tokens, inputs, outputs = shape
    own, e, x = leaf(3, outputs, inputs), leaf(4, tokens, outputs), leaf(4, tokens, inputs)

    def op(own: Tensor | None, e: Tensor, x: Tensor) -> Tensor:
        return lora_materialise(own, e, x, RAGGED, -0.3)

    by_row = torch.einsum("bto,bti->boi", e, x)
    change = -0.3 * torch.zeros_like(own).index_add(0, RAGGED.group_B, by_row)
    torch.testing.assert_close(op(own, e, x), own + change)
    torch.testing.assert_close(op(None, e, x), change)
    assert gradcheck(op, (own, e, x))
    assert gradgradcheck(op, (own, e, x))
    assert gradgradcheck(lambda e, x: op(None, e, x), (e, x))


def inner_lora_twice(
    x_context: Tensor, weight: Tensor, x_query: Tensor, groups: list[Tensor], steps: int
) -> Tensor:
    """Inner steps of a nonlinear loss at one low-rank weight, then a query at the weights they
    make.
    """
    contexts, queries = (GroupedRows(group, 3) for group in groups)
    own = weight.expand(3, *weight.shape)
    for level in range(steps):
        y = lora_product(x_context, weight.detach(), own, contexts, level)
        (gradient,) = torch.autograd.grad(y.sin().sum(), own, create_graph=True)
        own = rate(3).step(own, gradient)
    return lora_product(x_query, weight.detach(), own, queries, steps)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("outputs", [1, 4], ids=["to-the-rank", "from-the-rank"])
@pytest.mark.parametrize(
    "groups",
    [([0, 1, 2], [0, 1, 2]), ([2, 0, 0, 1], [1, 1, 0, 2, 1]), ([0, 1, 2], [2])],
    ids=["one-each", "ragged", "groups-without-queries"],
)
def test_inner_lora_equals_materialised_weights_and_its_double_backward_is_right(
    groups: tuple[list[int], list[int]], outputs: int, steps: int
) -> None:
    group = [torch.tensor(g) for g in groups]
    inputs = leaf(len(groups[0]), 2, 3), leaf(outputs, 3), leaf(len(groups[1]), 3, 3)
    assert_same_value_and_gradients(
        lambda *x: inner_lora_twice(*x, group, steps),
        lambda x, w, q: materialised_linear(x, w, None, q, group, steps),
        inputs,
    )


def test_inner_lora_is_differentiable_again_after_two_inner_steps() -> None:
    group = [torch.tensor([1, 0, 1]), torch.tensor([0, 1])]
    inputs = leaf(3, 2, 2), leaf(1, 2), leaf(2, 1, 2)
    assert gradgradcheck(lambda *x: inner_lora_twice(*x, group, 2), inputs)
