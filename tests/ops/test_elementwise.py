"""Norm, SwiGLU, GELU and rotary embedding in fp64: values, derivatives by finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from transformers.activations import NewGELUActivation
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from gdprompt_fast.models.memory import PeakMemory
from gdprompt_fast.ops.attention import attention
from gdprompt_fast.ops.gelu import gelu
from gdprompt_fast.ops.norm import add_norm, norm
from gdprompt_fast.ops.rotary import rotary
from gdprompt_fast.ops.swiglu import swiglu
from helpers.materialised import (
    leaf,
)

pytestmark = pytest.mark.quick


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 7), (1, 2, 3, 4)], ids=str)
def test_norm_equals_pytorch_and_is_twice_differentiable(
    center: bool, shape: tuple[int, ...]
) -> None:
    x, weight, bias = leaf(*shape), leaf(shape[0], shape[-1]), leaf(shape[0], shape[-1])

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm(x, weight, bias, eps=1e-3, center=center)

    plain = F.layer_norm if center else F.rms_norm
    rows = (shape[0], *(1,) * (len(shape) - 2), shape[-1])
    expected = plain(x, shape[-1:], eps=1e-3) * weight.view(rows) + bias.view(rows)
    torch.testing.assert_close(op(x, weight, bias), expected)
    assert gradcheck(op, (x, weight, bias))
    assert gradgradcheck(op, (x, weight, bias))


@pytest.mark.usefixtures("on_each_backend")
def test_norm_without_bias_is_twice_differentiable() -> None:
    inputs = leaf(2, 3, 5), leaf(2, 5)
    assert gradgradcheck(lambda x, w: norm(x, w, None, eps=1e-3, center=False), inputs)


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
def test_add_norm_equals_a_sum_and_its_norm_and_is_twice_differentiable(center: bool) -> None:
    x, residual, *rows = leaf(2, 3, 5), leaf(2, 3, 5), leaf(2, 5), leaf(2, 5)
    inputs = x, residual, *rows[: 1 + center]

    def op(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return add_norm(x, residual, weight, bias, eps=1e-3, center=center)

    h, y = op(*inputs)
    torch.testing.assert_close(h, x + residual)
    weight, bias = inputs[2], inputs[3] if center else None
    torch.testing.assert_close(y, norm(x + residual, weight, bias, eps=1e-3, center=center))
    for used in (lambda *t: op(*t), lambda *t: op(*t)[0], lambda *t: op(*t)[1]):
        assert gradcheck(used, inputs)
        assert gradgradcheck(used, inputs)


def test_a_residual_of_another_shape_is_refused() -> None:
    x = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=r"residual: expected torch.float32 \[2, 3, 5\] as x"):
        add_norm(x, x[:, :1], torch.ones(2, 5), None, eps=1e-3, center=False)


@pytest.mark.usefixtures("on_each_backend")
def test_swiglu_equals_pytorch_and_is_twice_differentiable() -> None:
    gate, up = leaf(3, 4), leaf(3, 4)
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
    assert gradcheck(swiglu, (gate, up))
    assert gradgradcheck(swiglu, (gate, up))


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_equals_pytorch_and_is_twice_differentiable(approximate: str) -> None:
    x = leaf(3, 5)

    def op(x: Tensor) -> Tensor:
        return gelu(2 * x, approximate)

    torch.testing.assert_close(op(x), F.gelu(2 * x, approximate=approximate))
    assert gradcheck(op, (x,))
    assert gradgradcheck(op, (x,))


def test_gelu_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"approximate: expected .none. or .tanh., got 'sigmoid'"):
        gelu(leaf(3), "sigmoid")


def bytes_of_two_derivatives(op: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int]:
    """What is kept between the two backward passes over x itself, and the peak."""
    with PeakMemory([x]) as memory:
        (dx,) = torch.autograd.grad(op(x).sum(), x, create_graph=True)
        kept = memory.live_bytes
        torch.autograd.grad(dx.sum(), x)
    return kept - x.nbytes, memory.peak_bytes - x.nbytes


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_takes_less_memory_than_autograd_takes(approximate: str) -> None:
    x = leaf(1000)
    kept, peak = bytes_of_two_derivatives(lambda x: gelu(x, approximate), x)
    plain = bytes_of_two_derivatives(lambda x: F.gelu(x, approximate=approximate), x)
    formula = bytes_of_two_derivatives(NewGELUActivation(), x)
    assert kept <= plain[0], f"{kept} bytes kept, {plain[0]} by PyTorch's gelu"
    assert kept <= 0.3 * formula[0], f"{kept} bytes kept, {formula[0]} by transformers' formula"
    assert peak <= 0.75 * min(plain[1], formula[1])


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("rotated", [6, 4], ids=["whole-heads", "part-of-each-head"])
@pytest.mark.parametrize("tables", [1, 2], ids=["shared-positions", "positions-of-each-row"])
def test_rotary_equals_transformers_and_is_differentiable_any_number_of_times(
    tables: int, rotated: int
) -> None:
    q, k = leaf(2, 3, 4, 6), leaf(2, 1, 4, 6)
    cos, sin = (leaf(tables, 4, rotated).detach() for _ in range(2))  # of unequal halves

    def op(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(q, k, cos, sin)

    torch.testing.assert_close(op(q, k), apply_rotary_pos_emb(q, k, cos, sin))
    assert gradcheck(op, (q, k))
    assert gradgradcheck(op, (q, k))

    def third(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        grads = sum(y.pow(4).sum() for y in function(q, k, cos, sin))
        for _ in range(2):
            grads = sum(g.sum() for g in torch.autograd.grad(grads, (q, k), create_graph=True))
        return torch.autograd.grad(grads, (q, k))

    torch.testing.assert_close(third(rotary), third(apply_rotary_pos_emb))


def test_rotary_of_tables_that_require_a_gradient_is_refused() -> None:
    x, table = leaf(1, 1, 2, 4), leaf(1, 2, 4)
    with pytest.raises(ValueError, match="cos, sin: expected constants"):
        rotary(x, x, table.detach(), table)


@pytest.mark.parametrize("op", ["norm", "swiglu", "gelu", "attention"])
def test_third_derivatives_raise(op: str) -> None:
    ops: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "norm": (
            lambda x, w: norm(x, w, None, eps=1e-3, center=False),
            [leaf(2, 3, 4), leaf(2, 4)],
        ),
        "swiglu": (swiglu, [leaf(3, 4), leaf(3, 4)]),
        "gelu": (gelu, [leaf(3, 4)]),
        "attention": (
            lambda q, k, v: attention(q, k, v, scale=1.0),
            [leaf(1, 1, 3, 2) for _ in range(3)],
        ),
    }
    function, inputs = ops[op]
    first = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op} is differentiable twice only"):
        torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs, create_graph=True)
