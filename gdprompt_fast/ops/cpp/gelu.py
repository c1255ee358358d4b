"""x Φ(x) with the tanh form of Φ: the three passes. The exact form runs in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..eager import gelu as eager

_ops = torch.ops.gdprompt_fast


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """y = x Φ(x)."""
    if approximate != "tanh":
        return eager.gelu_forward(x, approximate)
    x = x.contiguous()
    y = torch.empty_like(x)
    _ops.gelu_forward(x, y)
    return y


def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dx = dy ∘ gelu'(x)."""
    if approximate != "tanh":
        return eager.gelu_backward(dy, x, approximate)
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    _ops.gelu_backward(dy, x, dx)
    return dx


def gelu_double_backward(
    a: Tensor, dy: Tensor, x: Tensor, approximate: str
) -> tuple[Tensor, Tensor]:
    """Cotangents of dy and x from that of dx (a)."""
    if approximate != "tanh":
        return eager.gelu_double_backward(a, dy, x, approximate)
    a, dy, x = a.contiguous(), dy.contiguous(), x.contiguous()
    cot_dy, cot_x = torch.empty_like(x), torch.empty_like(x)
    _ops.gelu_double_backward(a, dy, x, cot_dy, cot_x)
    return cot_dy, cot_x
