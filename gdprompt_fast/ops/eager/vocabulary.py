"""The passes between two matrix products over a tile of logits z [G, N, v].

A tile holds the columns first, …, first + v − 1 of the vocabulary, or each group's own: where a
pass takes ``columns``, it is the number first or the ids [G, v]. A row's id is at one column of the
vocabulary, which need not be here; ids below 0 are nowhere. z and the row statistics are fp32 or
fp64 inside; tiles that go into a product are returned in ``dtype`` or are the tensor ``into``. z
and b̄ come fresh out of a product and may be overwritten; the teacher's logits and b may not.
"""

from __future__ import annotations

import torch
from torch import Tensor

Sums = tuple[Tensor, Tensor, Tensor]  # top, total and picked or gap, of all columns so far
Into = Tensor | torch.dtype  # the tensor to write a tile to, or the dtype of a new one
CotangentRows = tuple[Tensor, Tensor, Tensor, int | Tensor]  # center, weight, ids, columns


def online_softmax(
    z_GNv: Tensor, ids_GN: Tensor, first: int, dtype: torch.dtype, *sums: *Sums
) -> tuple[Tensor, *Sums, Tensor]:
    """e^(z − top), the statistics of all columns so far, and the factor by which older sums shrink.

    Returns:
        e, top = max z, total = Σ e^(z − top), picked = z at the row's id (0 until it is met) and
        shrink = e^(old top − top).
    """
    top_GN, total_GN, picked_GN = sums
    z = _wide(z_GNv)
    top = torch.maximum(top_GN, z.amax(-1))
    shrink = (top_GN - top).exp_()
    column, here = _find(ids_GN, first, z.shape[2])
    picked = picked_GN + torch.where(here, z.gather(2, column), 0.0)[..., 0]
    e = z.sub_(top[..., None]).exp_()
    total = torch.addcmul(e.sum(-1), total_GN, shrink)
    return e.to(dtype), top, total, picked, shrink


def online_kl(
    z_GNv: Tensor, teacher_z_GNv: Tensor, dtype: torch.dtype, *sums: *Sums
) -> tuple[Tensor, *Sums, Tensor]:
    """As :func:`online_softmax` for R = 2 N rows, the student's N and then the teacher's.

    Returns:
        e [G, R, v], top, total, gap = Σ e_teacher ∘ (teacher z − z) and shrink. A teacher's logit
        of −∞ has no share in the gap.
    """
    top_GR, total_GR, gap_GN = sums
    z = _wide(z_GNv)
    teacher_z = teacher_z_GNv.to(z.dtype)
    top = torch.maximum(top_GR, torch.cat([z.amax(-1), teacher_z.amax(-1)], 1))
    shrink = (top_GR - top).exp_()
    rows = z.shape[1]
    e = z.new_empty(len(z), 2 * rows, z.shape[2])
    torch.sub(z, top[:, :rows, None], out=e[:, :rows])
    torch.sub(teacher_z, top[:, rows:, None], out=e[:, rows:])
    e.exp_()
    total = torch.addcmul(e.sum(-1), total_GR, shrink)
    t = e[:, rows:]
    share = torch.where(t > 0, torch.sub(teacher_z, z, out=z).mul_(t), 0.0).sum(-1)
    return e.to(dtype), top, total, torch.addcmul(share, gap_GN, shrink[:, rows:]), shrink


def accumulate_(sum_GRX: Tensor, share_GRX: Tensor, shrink_GR: Tensor) -> Tensor:
    """sum = shrink ∘ sum + share, in place."""
    return sum_GRX.mul_(shrink_GR[..., None]).add_(share_GRX)


def softmax_minus_one_hot(
    z_GNv: Tensor, lse_GN: Tensor, into: Into, ids_GN: Tensor, columns: int | Tensor
) -> Tensor:
    """e^(z − lse) − onehot(id)."""
    p = _wide(z_GNv).sub_(lse_GN[..., None]).exp_()
    if isinstance(columns, int):
        column, here = _find(ids_GN, columns, p.shape[2])
        p.scatter_add_(2, column, -here.to(p.dtype))
    else:
        p.sub_(_matches(ids_GN, columns).to(p.dtype))
    return _in(into, p)


def softmax_difference(
    z_GNv: Tensor, lse_GN: Tensor, into: Into, teacher_z_GNv: Tensor, teacher_lse_GN: Tensor
) -> Tensor:
    """e^(z − lse) − e^(teacher z − teacher lse)."""
    p = _wide(z_GNv).sub_(lse_GN[..., None]).exp_()
    p.sub_((teacher_z_GNv.to(p.dtype) - teacher_lse_GN[..., None]).exp_())
    return _in(into, p)


def logit_cotangent(b_bar_GNv: Tensor, b_GNv: Tensor, into: Into, *rows: *CotangentRows) -> Tensor:
    """p ∘ (b̄ − center) + weight ∘ b, with b = p − onehot(id)."""
    center_GN, weight_GN, ids_GN, columns = rows
    x = _wide(b_bar_GNv).sub_((center_GN - weight_GN)[..., None])
    if isinstance(columns, int):
        column, here = _find(ids_GN, columns, x.shape[2])
        at_id = torch.where(here, x.gather(2, column) - weight_GN[..., None], 0.0)
        x.mul_(b_GNv).scatter_add_(2, column, at_id)
    else:
        at_id = _matches(ids_GN, columns) * (x - weight_GN[..., None])
        x.mul_(b_GNv).add_(at_id)
    return _in(into, x)


def _in(into: Into, t: Tensor) -> Tensor:
    return into.copy_(t) if isinstance(into, Tensor) else t.to(into)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _find(ids_GN: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """The column of every row's id, any if it is not here, and whether it is; [G, N, 1]."""
    column = (ids_GN - first)[..., None]
    here = (column >= 0) & (column < width)
    return torch.where(here, column, 0), here


def _matches(ids_GN: Tensor, columns_Gv: Tensor) -> Tensor:
    """Whether a column is the row's id, [G, N, v]."""
    return (ids_GN[:, :, None] == columns_Gv[:, None, :]) & (ids_GN >= 0)[..., None]
