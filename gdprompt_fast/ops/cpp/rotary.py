"""Rotary position embedding: a rotation and its adjoint. Shapes as in ops/rotary.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import rows


def rotary_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x ∘ cos + rotate_half(x) ∘ sin for q and k."""
    return _rotate(q, cos, sin, adjoint=False), _rotate(k, cos, sin, adjoint=False)


def rotary_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of q and k."""
    return _rotate(dq, cos, sin, adjoint=True), _rotate(dk, cos, sin, adjoint=True)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool) -> Tensor:
    x, cos, sin = rows(x, cos.to(x.dtype), sin.to(x.dtype))
    y = torch.empty_like(x)
    torch.ops.gdprompt_fast.rotary(x, cos, sin, adjoint, y)
    return y
