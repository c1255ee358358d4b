"""RMSNorm and LayerNorm with a weight and bias of their own for every row of the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from .backend import implementation
from .guard import differentiable_no_further


def norm(
    x: Tensor, weight_BD: Tensor, bias_BD: Tensor | None, *, eps: float, center: bool
) -> Tensor:
    """y = x̂ ∘ γ + β with x̂ = (x − μ) r, r = (mean((x − μ)²) + ε)^-½; μ = 0 unless ``center``.

    LayerNorm with ``center``, RMSNorm without. Twice differentiable; fp32 inside for half
    precision.

    Args:
        x: [B, …, D].
        weight_BD, bias_BD: [B, D], one row for each x[b].
    """
    return _Norm.apply(x, weight_BD, bias_BD, eps, center)


class _Norm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
    ) -> Tensor:
        y, mean, rstd = implementation("norm", x).norm_forward(x, weight, bias, eps, center)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx, dweight, dbias = _NormBackward.apply(dy, *ctx.saved_tensors)
        return dx, dweight, dbias if ctx.has_bias else None, None, None


class _NormBackward(Function):
    # dx = r (g − x̂ mean(g ∘ x̂) − mean(g)), g = dy ∘ γ;  dγ = Σ_t dy ∘ x̂;  dβ = Σ_t dy
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(dy, x, weight, mean, rstd)
        return implementation("norm", x).norm_backward(dy, x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, u: Tensor, v: Tensor, w: Tensor) -> Any:
        # With P g = r (g − x̂ mean(g ∘ x̂) − mean(g)), which is symmetric:
        #   cot dy = (P u) ∘ γ + v ∘ x̂ + w;   cot γ = Σ_t (P u) ∘ dy
        #   cot x  = P (v ∘ dy − r mean(g ∘ x̂) u − r mean(u ∘ x̂) g) − r x̂ mean(u ∘ dx)
        differentiable_no_further("norm", "twice")
        saved = ctx.saved_tensors
        cotangents = implementation("norm", u).norm_double_backward(u, v, w, *saved)
        return *cotangents, None, None
