"""RMSNorm and LayerNorm: the three passes. Shapes as in ops/norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..norm import Kept, Options


def norm_forward(
    x: Tensor, weight_BD: Tensor, bias_BD: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, μ (None without ``center``) and r, the latter two [B, …, 1] in fp32 or fp64."""
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True) if center else None
    centred = wide - mean if mean is not None else wide
    rstd = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    y = (centred * rstd).mul_(_per_row(weight_BD, x))
    if bias_BD is not None:
        y += _per_row(bias_BD, x)
    return y.to(x.dtype), mean, rstd


def add_norm_forward(
    x: Tensor, residual: Tensor, *options: *Options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """h = x + residual, and y, μ and r of h."""
    h = x + residual
    return h, *norm_forward(h, *options)


def norm_backward(
    dy: Tensor, dh: Tensor | None, into: Tensor | None, with_bias: bool, *kept: *Kept
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx, plus ``dh`` if given, added to ``into`` if given; dγ [B, D] and, ``with_bias``, dβ
    [B, D].
    """
    x, weight_BD, mean, rstd = kept
    xhat, wide_dy = _standardise(x, mean, rstd), _wide(dy)
    dx = _project(wide_dy * _per_row(weight_BD, x), xhat, rstd, mean is not None)
    if dh is not None:
        dx += dh
    dweight = _sum_tokens(wide_dy * xhat).to(weight_BD.dtype)
    dbias = _sum_tokens(wide_dy).to(weight_BD.dtype) if with_bias else None
    dx = dx.to(x.dtype) if into is None else into.add_(dx)
    return dx, dweight, dbias


def norm_double_backward(
    u: Tensor, v_BD: Tensor, w_BD: Tensor | None, dy: Tensor, *kept: *Kept
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of dy, x and γ from those of dx (u), dγ (v) and, if any, dβ (w)."""
    x, weight_BD, mean, rstd = kept
    center = mean is not None
    xhat, dy, u, gamma = _standardise(x, mean, rstd), _wide(dy), _wide(u), _per_row(weight_BD, x)
    g = dy * gamma
    dx = _project(g, xhat, rstd, center)
    pu = _project(u, xhat, rstd, center)
    cot_weight = _sum_tokens(pu * dy)
    cot_xhat = _per_row(v_BD, x) * dy
    cot_xhat -= rstd * (g * xhat).mean(-1, keepdim=True) * u
    cot_xhat -= rstd * (u * xhat).mean(-1, keepdim=True) * g
    cot_x = _project(cot_xhat, xhat, rstd, center)
    cot_x -= rstd * xhat * (u * dx).mean(-1, keepdim=True)
    cot_dy = pu.mul_(gamma).add_(_per_row(v_BD, x) * xhat)
    if w_BD is not None:
        cot_dy += _per_row(w_BD, x)
    return cot_dy.to(x.dtype), cot_x.to(x.dtype), cot_weight.to(weight_BD.dtype)


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
