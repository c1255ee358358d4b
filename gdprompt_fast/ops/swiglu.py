"""The gated activation of Llama-like models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .guard import differentiable_no_further


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) ∘ up, twice differentiable; keeps the two inputs only."""
    return _SwiGLU.apply(gate, up)


def _silu_slopes(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(g), silu'(g), silu''(g) from s = σ(g)."""
    s = torch.sigmoid(gate)
    value = gate * s
    first = s + value * (1 - s)
    second = s * (1 - s) * (2 + gate * (1 - 2 * s))
    return value, first, second


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _SwiGLUBackward.apply(dy, *ctx.saved_tensors)


class _SwiGLUBackward(Function):
    # dgate = dy ∘ up ∘ silu'(gate);  dup = dy ∘ silu(gate)
    @staticmethod
    def forward(ctx: Any, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(dy, gate, up)
        dgate = torch.ops.aten.silu_backward(dy, gate).mul_(up)
        dup = torch.nn.functional.silu(gate).mul_(dy)
        return dgate, dup

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> Any:
        # Cotangents a of dgate, b of dup.
        differentiable_no_further("swiglu", "twice")
        dy, gate, up = ctx.saved_tensors
        value, first, second = _silu_slopes(gate)
        a_first = a * first
        cot_dy = (a_first * up).addcmul_(b, value)
        cot_up = a_first.mul_(dy)
        cot_gate = second.mul_(a).mul_(up).addcmul_(b, first).mul_(dy)
        return cot_dy, cot_gate, cot_up
