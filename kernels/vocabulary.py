"""The passes between two matrix products over a tile of logits z [G, N, v] of ops/vocabulary.

Those here are elementwise, a program to a block of columns of a row; those that need the maximum of
a row are in online.py. z is read as it comes out of a product, in any dtype; the row statistics are
fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.eager.vocabulary import CotangentRows, Into
from .launching import run_kernel
from .online import accumulate_, online_kl, online_softmax
from .tiles import block_of, elementwise, grid, rows_of

__all__ = [
    "accumulate_",
    "logit_cotangent",
    "online_kl",
    "online_softmax",
    "softmax_difference",
    "softmax_minus_one_hot",
]


@triton.jit
def _is_id(id_ptr, columns_ptr, row, N, first, column, v):
    # whether a column is the row's id
    token = tl.load(id_ptr + row)
    if columns_ptr is None:
        return column == token - first
    else:
        ids = tl.load(columns_ptr + row // N * v + column, mask=column < v, other=-1)
        return (ids == token) & (token >= 0)


@triton.jit(do_not_specialize=["N", "first"])
def _softmax_minus_one_hot_kernel(
    z_ptr,  # [G·N, v] in, rows z_stride apart
    lse_ptr,  # [G·N] in, fp32
    id_ptr,  # [G·N] in, int64
    columns_ptr,  # [G, v] in, int64, or None: first, first + 1, …
    b_ptr,  # [G·N, v] out
    N,
    v,
    z_stride,
    first,
    BLOCK: tl.constexpr,
):
    # b = e^(z − lse) − onehot(id)
    row = tl.program_id(0).to(tl.int64)
    z, column = block_of(z_ptr, row, z_stride, tl.program_id(1) * BLOCK, v, BLOCK)
    b = tl.exp(z - tl.load(lse_ptr + row))
    b -= _is_id(id_ptr, columns_ptr, row, N, first, column, v).to(tl.float32)
    tl.store(b_ptr + row * v + column, b.to(b_ptr.dtype.element_ty), mask=column < v)


@triton.jit
def _softmax_difference_kernel(
    z_ptr,  # [R, v] in, rows z_stride apart
    lse_ptr,  # [R] in, fp32
    t_ptr,  # [R, v] in, the teacher's, rows t_stride apart
    t_lse_ptr,  # [R] in, fp32
    f_ptr,  # [R, v] out
    v,
    z_stride,
    t_stride,
    BLOCK: tl.constexpr,
):
    # f = e^(z − lse) − e^(t − t_lse)
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    z, column = block_of(z_ptr, row, z_stride, start, v, BLOCK)
    t, _ = block_of(t_ptr, row, t_stride, start, v, BLOCK)
    f = tl.exp(z - tl.load(lse_ptr + row)) - tl.exp(t - tl.load(t_lse_ptr + row))
    tl.store(f_ptr + row * v + column, f.to(f_ptr.dtype.element_ty), mask=column < v)


@triton.jit(do_not_specialize=["N", "first"])
def _logit_cotangent_kernel(
    b_bar_ptr,  # [G·N, v] in, rows stride apart
    center_ptr,  # [G·N] in, fp32
    weight_ptr,  # [G·N] in, fp32
    b_ptr,  # [G·N, v] in
    id_ptr,  # [G·N] in, int64
    columns_ptr,  # [G, v] in, int64, or None: first, first + 1, …
    z_cot_ptr,  # [G·N, v] out, b's dtype
    N,
    v,
    stride,
    first,
    BLOCK: tl.constexpr,
):
    # z_cot = p (b̄ − center) + weight b,  p = b + onehot(id)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_bar = tl.load(b_bar_ptr + row * stride + column, mask=column < v, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * v + column, mask=column < v, other=0.0).to(tl.float32)
    p = b + _is_id(id_ptr, columns_ptr, row, N, first, column, v).to(tl.float32)
    z_cot = p * (b_bar - tl.load(center_ptr + row)) + tl.load(weight_ptr + row) * b
    z_cot = z_cot.to(z_cot_ptr.dtype.element_ty)
    tl.store(z_cot_ptr + row * v + column, z_cot, mask=column < v)


def softmax_minus_one_hot(
    z_GNv: Tensor, lse_GN: Tensor, into: Into, ids_GN: Tensor, columns: int | Tensor
) -> Tensor:
    """e^(z − lse) − onehot(id)."""
    z = rows_of(z_GNv)
    b = _room(into, z_GNv)
    ids, (first, columns_ptr) = ids_GN.contiguous(), _columns(columns)
    run_kernel(
        _softmax_minus_one_hot_kernel,
        grid(b),
        z,
        lse_GN.contiguous(),
        ids,
        columns_ptr,
        b,
        *b.shape[1:],
        z.stride(0),
        first,
        **elementwise(b.shape[2]),
    )
    return b


def softmax_difference(
    z_GNv: Tensor, lse_GN: Tensor, into: Into, teacher_z_GNv: Tensor, teacher_lse_GN: Tensor
) -> Tensor:
    """e^(z − lse) − e^(teacher z − teacher lse)."""
    z, t = rows_of(z_GNv), rows_of(teacher_z_GNv)
    f = _room(into, z_GNv)
    lse, t_lse = lse_GN.contiguous(), teacher_lse_GN.contiguous()
    width = f.shape[2]
    run_kernel(
        _softmax_difference_kernel,
        grid(f),
        z,
        lse,
        t,
        t_lse,
        f,
        width,
        z.stride(0),
        t.stride(0),
        **elementwise(width),
    )
    return f


def logit_cotangent(b_bar_GNv: Tensor, b_GNv: Tensor, into: Into, *rows: *CotangentRows) -> Tensor:
    """p ∘ (b̄ − center) + weight ∘ b, with b = p − onehot(id)."""
    center_GN, weight_GN, ids_GN, columns = rows
    b_bar, b = rows_of(b_bar_GNv), b_GNv.contiguous()
    z_cot = _room(into, b)
    first, columns_ptr = _columns(columns)
    statistics = (t.contiguous() for t in (center_GN, weight_GN))
    run_kernel(
        _logit_cotangent_kernel,
        grid(b),
        b_bar,
        *statistics,
        b,
        ids_GN.contiguous(),
        columns_ptr,
        z_cot,
        *b.shape[1:],
        b_bar.stride(0),
        first,
        **elementwise(b.shape[2]),
    )
    return z_cot


def _room(into: Into, like: Tensor) -> Tensor:
    if isinstance(into, Tensor):
        return into
    return torch.empty(like.shape, dtype=into, device=like.device)


def _columns(columns: int | Tensor) -> tuple[int, Tensor | None]:
    return (columns, None) if isinstance(columns, int) else (0, columns.contiguous())
