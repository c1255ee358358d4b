"""The passes between two matrix products over a tile of logits z [G, N, v], as in
ops/eager/vocabulary.py. Tiles of each group's own columns, few and small, run in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..eager import vocabulary as eager
from ..eager.vocabulary import CotangentRows, Into, Sums

_ops = torch.ops.gdprompt_fast


def online_softmax(
    z_GNv: Tensor, ids_GN: Tensor, first: int, dtype: torch.dtype, *sums: *Sums
) -> tuple[Tensor, *Sums, Tensor]:
    """e^(z − top), top, total, picked and shrink."""
    e = torch.empty(z_GNv.shape, dtype=dtype)
    top, total, picked, shrink = (torch.empty_like(sums[0]) for _ in range(4))
    ids = ids_GN.contiguous()
    _ops.online_softmax(_rows(z_GNv), ids, first, *sums, e, top, total, picked, shrink)
    return e, top, total, picked, shrink


def online_kl(
    z_GNv: Tensor, teacher_z_GNv: Tensor, dtype: torch.dtype, *sums: *Sums
) -> tuple[Tensor, *Sums, Tensor]:
    """e^(z − top) of both, top, total, gap and shrink."""
    top_GR, total_GR, gap_GN = sums
    z, teacher_z = _same_dtype(z_GNv, teacher_z_GNv)
    e = torch.empty(*top_GR.shape, z.shape[2], dtype=dtype)
    top, total, shrink = (torch.empty_like(total_GR) for _ in range(3))
    gap = torch.empty_like(gap_GN)
    _ops.online_kl(z, teacher_z, *sums, e, top, total, gap, shrink)
    return e, top, total, gap, shrink


def accumulate_(sum_GRX: Tensor, share_GRX: Tensor, shrink_GR: Tensor) -> Tensor:
    """sum = shrink ∘ sum + share, in place."""
    if not sum_GRX.is_contiguous():
        return eager.accumulate_(sum_GRX, share_GRX, shrink_GR)
    _ops.accumulate(sum_GRX, _rows(share_GRX), shrink_GR)
    return sum_GRX


def softmax_minus_one_hot(
    z_GNv: Tensor, lse_GN: Tensor, into: Into, ids_GN: Tensor, columns: int | Tensor
) -> Tensor:
    """e^(z − lse) − onehot(id)."""
    if not isinstance(columns, int):
        return eager.softmax_minus_one_hot(z_GNv, lse_GN, into, ids_GN, columns)
    p = _room(into, z_GNv)
    _ops.softmax_minus_one_hot(_rows(z_GNv), lse_GN.contiguous(), ids_GN.contiguous(), columns, p)
    return p


def softmax_difference(
    z_GNv: Tensor, lse_GN: Tensor, into: Into, teacher_z_GNv: Tensor, teacher_lse_GN: Tensor
) -> Tensor:
    """e^(z − lse) − e^(teacher z − teacher lse)."""
    z, teacher_z = _same_dtype(z_GNv, teacher_z_GNv)
    f = _room(into, z)
    _ops.softmax_difference(z, lse_GN.contiguous(), teacher_z, teacher_lse_GN.contiguous(), f)
    return f


def logit_cotangent(b_bar_GNv: Tensor, b_GNv: Tensor, into: Into, *rows: *CotangentRows) -> Tensor:
    """p ∘ (b̄ − center) + weight ∘ b, with b = p − onehot(id)."""
    center_GN, weight_GN, ids_GN, columns = rows
    if not isinstance(columns, int):
        return eager.logit_cotangent(b_bar_GNv, b_GNv, into, *rows)
    z_bar = _room(into, b_GNv)
    statistics = center_GN.contiguous(), weight_GN.contiguous()
    ids = ids_GN.contiguous()
    _ops.logit_cotangent(_rows(b_bar_GNv), *statistics, _rows(b_GNv), ids, columns, z_bar)
    return z_bar


def _room(into: Into, like: Tensor) -> Tensor:
    return into if isinstance(into, Tensor) else torch.empty(like.shape, dtype=into)


def _rows(t_GNv: Tensor) -> Tensor:
    """The same with contiguous rows, all evenly spaced."""
    even = t_GNv.stride(0) == t_GNv.shape[1] * t_GNv.stride(1)
    return t_GNv if t_GNv.stride(2) == 1 and even else t_GNv.contiguous()


def _same_dtype(z_GNv: Tensor, teacher_z_GNv: Tensor) -> tuple[Tensor, Tensor]:
    if z_GNv.dtype != teacher_z_GNv.dtype:
        wide = torch.promote_types(z_GNv.dtype, torch.float32)
        z_GNv, teacher_z_GNv = z_GNv.to(wide), teacher_z_GNv.to(wide)
    return _rows(z_GNv), _rows(teacher_z_GNv)
