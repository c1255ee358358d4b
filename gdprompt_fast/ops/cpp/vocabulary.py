"""The passes between two matrix products over a tile of logits z [G, N, v], as in
ops/eager/vocabulary.py. Tiles of each group's own columns, few and small, run in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..eager import vocabulary as eager

_ops = torch.ops.gdprompt_fast


def online_softmax(
    z_GNv: Tensor,
    ids_GN: Tensor,
    first: int,
    top_GN: Tensor,
    total_GN: Tensor,
    picked_GN: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """e^(z − top), the statistics of all columns so far, and the factor by which older sums shrink.

    Returns:
        e, top = max z, total = Σ e^(z − top), picked = z at the row's id (0 until it is met) and
        shrink = e^(old top − top).
    """
    e = torch.empty(z_GNv.shape, dtype=dtype)
    top, total, picked, shrink = (torch.empty_like(total_GN) for _ in range(4))
    before = top_GN, total_GN, picked_GN
    ids = ids_GN.contiguous()
    _ops.online_softmax(_rows(z_GNv), ids, first, *before, e, top, total, picked, shrink)
    return e, top, total, picked, shrink


def online_kl(
    z_GNv: Tensor,
    teacher_z_GNv: Tensor,
    top_GR: Tensor,
    total_GR: Tensor,
    gap_GN: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`online_softmax` for R = 2 N rows, the student's N and then the teacher's.

    Returns:
        e [G, R, v], top, total, gap = Σ e_teacher ∘ (teacher z − z) and shrink. A teacher's logit
        of −∞ has no share in the gap.
    """
    z, teacher_z = _same_dtype(z_GNv, teacher_z_GNv)
    e = torch.empty(*top_GR.shape, z.shape[2], dtype=dtype)
    top, total, shrink = (torch.empty_like(total_GR) for _ in range(3))
    gap = torch.empty_like(gap_GN)
    _ops.online_kl(z, teacher_z, top_GR, total_GR, gap_GN, e, top, total, gap, shrink)
    return e, top, total, gap, shrink


def accumulate_(sum_GRX: Tensor, share_GRX: Tensor, shrink_GR: Tensor) -> Tensor:
    """sum = shrink ∘ sum + share, in place."""
    if not sum_GRX.is_contiguous():
        return eager.accumulate_(sum_GRX, share_GRX, shrink_GR)
    _ops.accumulate(sum_GRX, _rows(share_GRX), shrink_GR)
    return sum_GRX


def softmax_minus_one_hot(
    z_GNv: Tensor,
    lse_GN: Tensor,
    ids_GN: Tensor,
    columns: int | Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """e^(z − lse) − onehot(id), in ``out`` if given."""
    if not isinstance(columns, int):
        return eager.softmax_minus_one_hot(z_GNv, lse_GN, ids_GN, columns, dtype, out)
    p = torch.empty(z_GNv.shape, dtype=dtype) if out is None else out
    _ops.softmax_minus_one_hot(_rows(z_GNv), lse_GN.contiguous(), ids_GN.contiguous(), columns, p)
    return p


def softmax_difference(
    z_GNv: Tensor,
    lse_GN: Tensor,
    teacher_z_GNv: Tensor,
    teacher_lse_GN: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """e^(z − lse) − e^(teacher z − teacher lse), in ``out`` if given."""
    z, teacher_z = _same_dtype(z_GNv, teacher_z_GNv)
    f = torch.empty(z.shape, dtype=dtype) if out is None else out
    _ops.softmax_difference(z, lse_GN.contiguous(), teacher_z, teacher_lse_GN.contiguous(), f)
    return f


def logit_cotangent(
    b_bar_GNv: Tensor,
    center_GN: Tensor,
    weight_GN: Tensor,
    b_GNv: Tensor,
    ids_GN: Tensor,
    columns: int | Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """p ∘ (b̄ − center) + weight ∘ b, with b = p − onehot(id), in b's dtype; in ``out`` if given."""
    if not isinstance(columns, int):
        return eager.logit_cotangent(b_bar_GNv, center_GN, weight_GN, b_GNv, ids_GN, columns, out)
    z_bar = torch.empty(b_GNv.shape, dtype=b_GNv.dtype) if out is None else out
    statistics = center_GN.contiguous(), weight_GN.contiguous()
    ids = ids_GN.contiguous()
    _ops.logit_cotangent(_rows(b_bar_GNv), *statistics, _rows(b_GNv), ids, columns, z_bar)
    return z_bar


def _rows(t_GNv: Tensor) -> Tensor:
    """The same with contiguous rows, all evenly spaced."""
    even = t_GNv.stride(0) == t_GNv.shape[1] * t_GNv.stride(1)
    return t_GNv if t_GNv.stride(2) == 1 and even else t_GNv.contiguous()


def _same_dtype(z_GNv: Tensor, teacher_z_GNv: Tensor) -> tuple[Tensor, Tensor]:
    if z_GNv.dtype != teacher_z_GNv.dtype:
        wide = torch.promote_types(z_GNv.dtype, torch.float32)
        z_GNv, teacher_z_GNv = z_GNv.to(wide), teacher_z_GNv.to(wide)
    return _rows(z_GNv), _rows(teacher_z_GNv)
