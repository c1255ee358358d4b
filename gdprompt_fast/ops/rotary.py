"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..errors import UserError
from .backend import implementation


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """y = x ∘ cos + rotate_half(x) ∘ sin for q and k, rotate_half([x₁, x₂]) = [−x₂, x₁].

    Linear in q and k, so its backward passes are rotations too, and it is differentiable any number
    of times; keeps cos and sin only.

    Args:
        q: [B, H, T, D].
        k: [B, K, T, D], K key heads.
        cos, sin: [B or 1, T, R], constants; R is even, and only the first R of D are rotated.

    Raises:
        ValueError: for cos or sin that require a gradient.
    """
    if cos.requires_grad or sin.requires_grad:
        raise UserError("cos, sin: expected constants, got one that requires a gradient")
    return _Rotary.apply(q, k, cos, sin, False)


class _Rotary(Function):
    # The adjoint:  dx₁ = dy₁ ∘ cos₁ + dy₂ ∘ sin₂;  dx₂ = dy₂ ∘ cos₂ − dy₁ ∘ sin₁
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, adjoint: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.adjoint = adjoint
        passes = implementation("rotary", q)
        rotate = passes.rotary_backward if adjoint else passes.rotary_forward
        return rotate(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        return *_Rotary.apply(dq, dk, *ctx.saved_tensors, not ctx.adjoint), None, None, None
