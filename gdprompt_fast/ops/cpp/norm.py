"""RMSNorm and LayerNorm: the three passes. Shapes as in ops/norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..norm import Kept, Options

_ops = torch.ops.gdprompt_fast
CHUNK = 64  # rows that csrc/norm.cpp sums to one


def norm_forward(
    x: Tensor, weight_BD: Tensor, bias_BD: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, μ (None without ``center``) and r, the latter two [B, …, 1] in fp32 or fp64."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=_wide(x))
    mean = torch.empty_like(rstd) if center else None
    bias = None if bias_BD is None else _rows(bias_BD, x)
    _ops.norm_forward(x, _rows(weight_BD, x), bias, eps, y, mean, rstd)
    return y, mean, rstd


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
    dy, x = dy.contiguous(), x.contiguous()
    dx, dweight, dbias = torch.empty_like(x), _partials(x), _partials(x)
    _ops.norm_backward(dy, x, _rows(weight_BD, x), mean, rstd, dx, dweight, dbias)
    if dh is not None:
        dx += dh
    if into is not None:
        dx = into.add_(dx)
    dtype = weight_BD.dtype
    return dx, dweight.sum(1).to(dtype), dbias.sum(1).to(dtype) if with_bias else None


def norm_double_backward(
    u: Tensor, v_BD: Tensor, w_BD: Tensor | None, dy: Tensor, *kept: *Kept
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of dy, x and γ from those of dx (u), dγ (v) and, if any, dβ (w)."""
    x, weight_BD, mean, rstd = kept
    u, dy, x = u.contiguous(), dy.contiguous(), x.contiguous()
    w_BD = torch.zeros_like(v_BD) if w_BD is None else w_BD
    v, w, weight = (_rows(t, x) for t in (v_BD, w_BD, weight_BD))
    cot_dy, cot_x, cot_weight = torch.empty_like(x), torch.empty_like(x), _partials(x)
    _ops.norm_double_backward(u, v, w, dy, x, weight, mean, rstd, cot_dy, cot_x, cot_weight)
    return cot_dy, cot_x, cot_weight.sum(1).to(weight_BD.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _rows(t_BD: Tensor, x: Tensor) -> Tensor:
    """In the dtype that x is computed in, each row contiguous."""
    t_BD = t_BD.to(_wide(x))
    return t_BD if t_BD.stride(1) == 1 else t_BD.contiguous()


def _partials(x: Tensor) -> Tensor:
    """[B, chunks, D]: room for the sum over each chunk of an example's rows."""
    rows = x[:1, ..., 0].numel()
    return torch.empty(x.shape[0], -(-rows // CHUNK), x.shape[-1], dtype=_wide(x))
