"""The gated activation of Llama-like models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .backend import implementation
from .guard import forbid_higher_order
from .left import Left


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) ∘ up, twice differentiable; keeps the two inputs only."""
    y, _ = _SwiGLU.apply(gate, up)
    return y


class _SwiGLU(Function):
    # The second output is an anchor (ops/left.py): the cotangents of gate and up that the double
    # backward leaves are added to in the last backward's own pass.
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        anchor, ctx.left = gate.new_empty(0), Left()
        ctx.save_for_backward(anchor, gate, up)
        ctx.set_materialize_grads(False)
        return implementation("swiglu", gate).swiglu_forward(gate, up), anchor

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> Any:
        anchor, gate, up = ctx.saved_tensors
        if dy is None:
            return ctx.left.take() or (None, None)
        if torch.is_grad_enabled():
            return _SwiGLUBackward.apply(dy, anchor, gate.detach(), up.detach(), ctx.left)
        return implementation("swiglu", gate).swiglu_backward(dy, gate, up, ctx.left.take())


class _SwiGLUBackward(Function):
    # dgate = dy ∘ up ∘ silu'(gate);  dup = dy ∘ silu(gate)
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, anchor: Tensor, gate: Tensor, up: Tensor, left: Left
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(dy, gate, up)
        ctx.left = left
        return implementation("swiglu", gate).swiglu_backward(dy, gate, up)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> Any:
        # Cotangents a of dgate, b of dup:
        #   cot dy = a ∘ up ∘ silu' + b ∘ silu;  cot up = a ∘ dy ∘ silu'
        #   cot gate = dy ∘ (a ∘ up ∘ silu'' + b ∘ silu')
        forbid_higher_order("swiglu", "twice")
        passes = implementation("swiglu", a)
        cot_dy, *cotangents = passes.swiglu_double_backward(a, b, *ctx.saved_tensors)
        ctx.left.put(*cotangents)
        return cot_dy, None, None, None, None
