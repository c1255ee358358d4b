"""The activation of GPT-like models."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..errors import UserError
from .backend import implementation
from .guard import forbid_higher_order


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """y = x Φ(x), twice differentiable; keeps x only.

    Args:
        x: of any shape.
        approximate: "none", or "tanh" for Φ(x) ≈ ½ (1 + tanh(√(2/π) (x + 0.044715 x³))).

    Raises:
        ValueError: for another form.
    """
    if approximate not in ("none", "tanh"):
        raise UserError(f'approximate: expected "none" or "tanh", got {approximate!r}')
    return _GELU.apply(x, approximate)


class _GELU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        return implementation("gelu", x).gelu_forward(x, approximate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _GELUBackward.apply(dy, *ctx.saved_tensors, ctx.approximate), None


class _GELUBackward(Function):
    # dx = dy ∘ gelu'(x)
    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(dy, x)
        ctx.approximate = approximate
        return implementation("gelu", x).gelu_backward(dy, x, approximate)

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> Any:
        # Cotangent a of dx:  cot dy = a ∘ gelu'(x);  cot x = a ∘ dy ∘ gelu''(x)
        forbid_higher_order("gelu", "twice")
        passes = implementation("gelu", a)
        return *passes.gelu_double_backward(a, *ctx.saved_tensors, ctx.approximate), None
