"""The passes over a tile of logits z [G, N, v] that need the maximum of a row, a program to a row.

A row of at most WHOLE_ROW columns stays in registers between its maximum and its exponentials; one
that is longer is read twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.eager.vocabulary import Sums
from .launching import run_kernel
from .sizes import next_power_of_2
from .tiles import block_of, elementwise, grid, rows_of

WHOLE_ROW = 16384
SWEEP_BLOCK = 4096  # columns of a longer row that a program takes at once
ELEMENTS_PER_THREAD = 16  # of each row in registers, more where 16 warps are too few for that
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: e^(−∞ − LOWEST) is 0


@triton.jit
def _top_of(z_ptr, row, stride, v, top, BLOCK: tl.constexpr):
    # max of top and a row
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    for start in range(0, v, BLOCK):
        z, _ = block_of(z_ptr, row, stride, start, v, BLOCK)
        highest = tl.maximum(highest, z)
    return tl.maximum(top, tl.max(highest, 0))


@triton.jit
def _exponentials(z, top, e_ptr, row, v, column):
    # e^(z − top), also stored
    e = tl.exp(z - top)
    at = row * v + column
    tl.store(e_ptr + at, e.to(e_ptr.dtype.element_ty), mask=column < v)
    return e


@triton.jit(do_not_specialize=["R", "first"])
def _online_softmax_kernel(
    z_ptr,  # [R, v] in, rows z_stride apart
    id_ptr,  # [R] in, int64
    top_ptr,  # [R] in, fp32
    total_ptr,  # [R] in, fp32
    picked_ptr,  # [R] in, fp32
    e_ptr,  # [R, v] out
    new_ptr,  # [4, R] out, fp32: top, total, picked and shrink
    R,
    v,
    z_stride,
    first,
    WHOLE: tl.constexpr,  # v is at most BLOCK
    BLOCK: tl.constexpr,
):
    # top' = max(top, max z);  shrink = e^(top − top');  e = e^(z − top');
    # total' = shrink total + Σ e;  picked' = picked + z[id − first] if it is here
    row = tl.program_id(0).to(tl.int64)
    old = tl.load(top_ptr + row)
    if WHOLE:
        z, column = block_of(z_ptr, row, z_stride, 0, v, BLOCK)
        top = tl.maximum(old, tl.max(z, 0))
        total = _exponentials(z, top, e_ptr, row, v, column)
    else:
        top = _top_of(z_ptr, row, z_stride, v, old, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, v, BLOCK):
            z, column = block_of(z_ptr, row, z_stride, start, v, BLOCK)
            total += _exponentials(z, top, e_ptr, row, v, column)
    shrink = tl.exp(old - top)
    at = tl.load(id_ptr + row) - first
    here = (at >= 0) & (at < v)
    picked = tl.load(z_ptr + row * z_stride + at, mask=here, other=0.0).to(tl.float32)
    tl.store(new_ptr + row, top)
    tl.store(new_ptr + R + row, tl.load(total_ptr + row) * shrink + tl.sum(total, 0))
    tl.store(new_ptr + 2 * R + row, tl.load(picked_ptr + row) + picked)
    tl.store(new_ptr + 3 * R + row, shrink)


@triton.jit
def _gap(t_e, t, z):
    # e_t (t − z), 0 where e_t is 0
    return tl.where(t_e > 0, t_e * (t - z), 0.0)


@triton.jit(do_not_specialize=["R", "N"])
def _online_kl_kernel(
    z_ptr,  # [G·N, v] in, rows z_stride apart
    t_ptr,  # [G·N, v] in, the teacher's, rows t_stride apart
    top_ptr,  # [G, 2 N] in, fp32
    total_ptr,  # [G, 2 N] in, fp32
    gap_ptr,  # [G·N] in, fp32
    e_ptr,  # [G, 2 N, v] out
    new_ptr,  # [3, G, 2 N] out, fp32: top, total and shrink
    new_gap_ptr,  # [G·N] out, fp32
    R,  # 2 G N
    N,
    v,
    z_stride,
    t_stride,
    WHOLE: tl.constexpr,  # v is at most BLOCK
    BLOCK: tl.constexpr,
):
    # as _online_softmax_kernel for both rows;  gap' = shrink gap + Σ e_t (t − z)
    row = tl.program_id(0).to(tl.int64)
    student = row + row // N * N
    teacher = student + N
    old, t_old = tl.load(top_ptr + student), tl.load(top_ptr + teacher)
    if WHOLE:
        z, column = block_of(z_ptr, row, z_stride, 0, v, BLOCK)
        t, _ = block_of(t_ptr, row, t_stride, 0, v, BLOCK)
        top, t_top = tl.maximum(old, tl.max(z, 0)), tl.maximum(t_old, tl.max(t, 0))
        total = _exponentials(z, top, e_ptr, student, v, column)
        t_total = _exponentials(t, t_top, e_ptr, teacher, v, column)
        gap = _gap(t_total, t, z)
    else:
        top = _top_of(z_ptr, row, z_stride, v, old, BLOCK)
        t_top = _top_of(t_ptr, row, t_stride, v, t_old, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        t_total = tl.zeros((BLOCK,), tl.float32)
        gap = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, v, BLOCK):
            z, column = block_of(z_ptr, row, z_stride, start, v, BLOCK)
            t, _ = block_of(t_ptr, row, t_stride, start, v, BLOCK)
            total += _exponentials(z, top, e_ptr, student, v, column)
            t_e = _exponentials(t, t_top, e_ptr, teacher, v, column)
            t_total += t_e
            gap += _gap(t_e, t, z)
    shrink, t_shrink = tl.exp(old - top), tl.exp(t_old - t_top)
    new_total = tl.load(total_ptr + student) * shrink + tl.sum(total, 0)
    new_t_total = tl.load(total_ptr + teacher) * t_shrink + tl.sum(t_total, 0)
    tl.store(new_ptr + student, top)
    tl.store(new_ptr + teacher, t_top)
    tl.store(new_ptr + R + student, new_total)
    tl.store(new_ptr + R + teacher, new_t_total)
    tl.store(new_ptr + 2 * R + student, shrink)
    tl.store(new_ptr + 2 * R + teacher, t_shrink)
    tl.store(new_gap_ptr + row, tl.load(gap_ptr + row) * t_shrink + tl.sum(gap, 0))


@triton.jit
def _accumulate_kernel(
    sum_ptr,  # [R, X] in and out, fp32
    share_ptr,  # [R, X] in
    shrink_ptr,  # [R] in, fp32
    X,
    BLOCK: tl.constexpr,
):
    # sum = shrink sum + share
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * X + column
    total = tl.load(sum_ptr + at, mask=column < X, other=0.0)
    share = tl.load(share_ptr + at, mask=column < X, other=0.0).to(tl.float32)
    tl.store(sum_ptr + at, total * tl.load(shrink_ptr + row) + share, mask=column < X)


def online_softmax(
    z_GNv: Tensor, ids_GN: Tensor, first: int, dtype: torch.dtype, *sums: *Sums
) -> tuple[Tensor, *Sums, Tensor]:
    """e^(z − top), top, total, picked and shrink."""
    z = rows_of(z_GNv)
    e = torch.empty(z_GNv.shape, dtype=dtype, device=z.device)
    new = torch.empty(4, *ids_GN.shape, dtype=torch.float32, device=z.device)
    statistics = (s.contiguous() for s in (ids_GN, *sums))
    run_kernel(
        _online_softmax_kernel,
        (len(z),),
        z,
        *statistics,
        e,
        new,
        *z.shape,
        z.stride(0),
        first,
        **_sweep(z.shape[1]),
    )
    top, total, picked, shrink = new
    return e, top, total, picked, shrink


def online_kl(
    z_GNv: Tensor, teacher_z_GNv: Tensor, dtype: torch.dtype, *sums: *Sums
) -> tuple[Tensor, *Sums, Tensor]:
    """e^(z − top) of both, top, total, gap and shrink."""
    z, t = rows_of(z_GNv), rows_of(teacher_z_GNv)
    groups, rows, width = z_GNv.shape
    e = torch.empty(groups, 2 * rows, width, dtype=dtype, device=z.device)
    new = torch.empty(3, groups, 2 * rows, dtype=torch.float32, device=z.device)
    gap = torch.empty(groups, rows, dtype=torch.float32, device=z.device)
    statistics = (s.contiguous() for s in sums)
    run_kernel(
        _online_kl_kernel,
        (len(z),),
        z,
        t,
        *statistics,
        e,
        new,
        gap,
        2 * len(z),
        rows,
        width,
        z.stride(0),
        t.stride(0),
        **_sweep(width),
    )
    top, total, shrink = new
    return e, top, total, gap, shrink


def accumulate_(sum_GRX: Tensor, share_GRX: Tensor, shrink_GR: Tensor) -> Tensor:
    """sum = shrink ∘ sum + share, in place."""
    share, shrink = share_GRX.contiguous(), shrink_GR.contiguous()
    assert sum_GRX.is_contiguous()
    width = share.shape[2]
    run_kernel(_accumulate_kernel, grid(share), sum_GRX, share, shrink, width, **elementwise(width))
    return sum_GRX


def _sweep(width: int) -> dict[str, Any]:
    """The constants of a program to a row."""
    block = next_power_of_2(width) if width <= WHOLE_ROW else SWEEP_BLOCK
    most = 8 if torch.version.hip else 16  # 512 threads
    warps = min(most, max(1, block // (32 * ELEMENTS_PER_THREAD)))
    return {"WHOLE": width <= block, "BLOCK": block, "num_warps": warps}
