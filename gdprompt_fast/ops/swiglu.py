"""The gated activation of Llama-like models."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from .backend import implementation
from .guard import forbid_higher_order


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) ∘ up, twice differentiable; keeps the two inputs only."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return implementation("swiglu", gate).swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _SwiGLUBackward.apply(dy, *ctx.saved_tensors)


class _SwiGLUBackward(Function):
    # dgate = dy ∘ up ∘ silu'(gate);  dup = dy ∘ silu(gate)
    @staticmethod
    def forward(ctx: Any, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(dy, gate, up)
        return implementation("swiglu", gate).swiglu_backward(dy, gate, up)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> Any:
        # Cotangents a of dgate, b of dup:
        #   cot dy = a ∘ up ∘ silu' + b ∘ silu;  cot up = a ∘ dy ∘ silu'
        #   cot gate = dy ∘ (a ∘ up ∘ silu'' + b ∘ silu')
        forbid_higher_order("swiglu", "twice")
        return implementation("swiglu", a).swiglu_double_backward(a, b, *ctx.saved_tensors)
