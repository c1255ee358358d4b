"""x Φ(x), exact or with the tanh form of Φ: the three passes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

K, C = math.sqrt(2 / math.pi), 0.044715  # the tanh form's u = K (x + C x³)


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """y = x Φ(x)."""
    y: Tensor = torch.ops.aten.gelu(x, approximate=approximate)  # F.gelu may be another by now
    return y


def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dx = dy ∘ gelu'(x)."""
    return torch.ops.aten.gelu_backward(dy, x, approximate=approximate)


def gelu_double_backward(
    a: Tensor, dy: Tensor, x: Tensor, approximate: str
) -> tuple[Tensor, Tensor]:
    """Cotangents of dy and x from that of dx (a); gelu'' in fp32 for half precision."""
    wide = x if x.dtype == torch.float64 else x.float()
    second = _second_tanh(wide) if approximate == "tanh" else _second_exact(wide)
    return gelu_backward(a, x, approximate), second.mul_(a).mul_(dy).to(x.dtype)


def _second_exact(x: Tensor) -> Tensor:
    """gelu''(x) = (2 − x²) φ(x), φ(x) = exp(−x²/2) / √(2π)."""
    square = x * x
    density = torch.exp(-0.5 * square).mul_(1 / math.sqrt(2 * math.pi))
    return square.neg_().add_(2).mul_(density)


def _second_tanh(x: Tensor) -> Tensor:
    """gelu''(x) = (1 − t²) (u' + ½ x u'' − x t u'²), t = tanh(u)."""
    square = x * x
    first = square.mul(3 * K * C).add_(K)
    t = square.mul(K * C).add_(K).mul_(x).tanh_()
    curve = square.mul_(6 * K * C).add_(K).addcmul_(x * t, first.square_(), value=-1)
    return t.square_().neg_().add_(1).mul_(curve)
