"""RMSNorm and LayerNorm with a weight and bias of their own for every row of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

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


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _per_row(t_BD: Tensor, like: Tensor) -> Tensor:
    """[B, D] → [B, 1, …, D], to broadcast against ``like`` [B, …, D]."""
    return _wide(t_BD).view(t_BD.shape[0], *(1,) * (like.dim() - 2), t_BD.shape[-1])


def _sum_tokens(t: Tensor) -> Tensor:
    """[B, …, D] → [B, D]."""
    return t.flatten(1, -2).sum(1) if t.dim() > 2 else t


def _standardise(x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    return (_wide(x) - mean) * rstd if mean is not None else _wide(x) * rstd


def _project(g: Tensor, xhat: Tensor, rstd: Tensor, center: bool) -> Tensor:
    """r (g − x̂ mean(g ∘ x̂) − [center] mean(g)): the symmetric derivative of x̂ with respect to x,
    times g.
    """
    out = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if center:
        out -= g.mean(-1, keepdim=True)
    return out.mul_(rstd)


class _Norm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
    ) -> Tensor:
        wide = _wide(x)
        mean = wide.mean(-1, keepdim=True) if center else None
        centred = wide - mean if mean is not None else wide
        rstd = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
        y = (centred * rstd).mul_(_per_row(weight, x))
        if bias is not None:
            y += _per_row(bias, x)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = _NormBackward.apply(dy, x, weight, mean, rstd)
        return dx, dweight, dbias if ctx.has_bias else None, None, None


class _NormBackward(Function):
    # dx = r (g − x̂ mean(g ∘ x̂) − mean(g)), g = dy ∘ γ;  dγ = Σ_t dy ∘ x̂;  dβ = Σ_t dy
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(dy, x, weight, mean, rstd)
        xhat, wide_dy = _standardise(x, mean, rstd), _wide(dy)
        dx = _project(wide_dy * _per_row(weight, x), xhat, rstd, mean is not None)
        dweight, dbias = _sum_tokens(wide_dy * xhat), _sum_tokens(wide_dy)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, u: Tensor, v: Tensor, w: Tensor) -> Any:
        # Cotangents u of dx, v of dγ, w of dβ. With P the projection above (symmetric):
        #   cot dy = (P u) ∘ γ + v ∘ x̂ + w;   cot γ = Σ_t (P u) ∘ dy
        #   cot x  = P (v ∘ dy − r mean(g ∘ x̂) u − r mean(u ∘ x̂) g) − r x̂ mean(u ∘ dx)
        differentiable_no_further("norm", "twice")
        dy, x, weight, mean, rstd = ctx.saved_tensors
        center = mean is not None
        xhat, dy, u, gamma = _standardise(x, mean, rstd), _wide(dy), _wide(u), _per_row(weight, x)
        g = dy * gamma
        dx = _project(g, xhat, rstd, center)
        pu = _project(u, xhat, rstd, center)
        cot_weight = _sum_tokens(pu * dy)
        cot_xhat = _per_row(v, x) * dy
        cot_xhat -= rstd * (g * xhat).mean(-1, keepdim=True) * u
        cot_xhat -= rstd * (u * xhat).mean(-1, keepdim=True) * g
        cot_x = _project(cot_xhat, xhat, rstd, center)
        cot_x -= rstd * xhat * (u * dx).mean(-1, keepdim=True)
        cot_dy = pu.mul_(gamma).add_(_per_row(v, x) * xhat).add_(_per_row(w, x))
        return cot_dy.to(x.dtype), cot_x.to(x.dtype), cot_weight.to(weight.dtype), None, None
