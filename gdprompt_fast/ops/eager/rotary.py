"""Rotary position embedding: a rotation and its adjoint. Shapes as in ops/rotary.py."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x ∘ cos + rotate_half(x) ∘ sin for q and k."""
    sin_1, sin_2 = sin.chunk(2, -1)
    return _rotate(q, cos, -sin_1, sin_2), _rotate(k, cos, -sin_1, sin_2)


def rotary_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of q and k."""
    sin_1, sin_2 = sin.chunk(2, -1)
    return _rotate(dq, cos, sin_2, -sin_1), _rotate(dk, cos, sin_2, -sin_1)


def _rotate(x: Tensor, cos: Tensor, to_1: Tensor, to_2: Tensor) -> Tensor:
    """y₁ = x₁ ∘ cos₁ + x₂ ∘ to_1;  y₂ = x₂ ∘ cos₂ + x₁ ∘ to_2;  the rest of x as it is."""
    rotated, half = cos.shape[-1], cos.shape[-1] // 2
    y = torch.empty_like(x)
    torch.mul(x[..., :rotated], cos.unsqueeze(1), out=y[..., :rotated])
    y[..., :half].addcmul_(x[..., half:rotated], to_1.unsqueeze(1))
    y[..., half:rotated].addcmul_(x[..., :half], to_2.unsqueeze(1))
    y[..., rotated:] = x[..., rotated:]
    return y
