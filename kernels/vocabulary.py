"""The passes between two matrix products over a tile of logits z [G, N, v] of ops/vocabulary.

The passes that need the maximum of a row walk over it twice, a program to a row; the others are
elementwise, a program to BLOCK columns of a row. z is read as it comes out of a product, in any
dtype; the row statistics are fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4
SWEEP_BLOCK = 2048  # columns of a row that one program walks over
SWEEP_WARPS = 8
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: e^(−∞ − LOWEST) is 0


@triton.jit
def _block_of(z_ptr, row, stride, start, v, BLOCK: tl.constexpr):
    # z[row, start + i] in fp32, −∞ beyond v
    column = start + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * stride + column, mask=column < v, other=float("-inf"))
    return z.to(tl.float32), column


@triton.jit
def _top_of(z_ptr, row, stride, v, top, BLOCK: tl.constexpr):
    # max of top and a row
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    for start in range(0, v, BLOCK):
        z, _ = _block_of(z_ptr, row, stride, start, v, BLOCK)
        highest = tl.maximum(highest, z)
    return tl.maximum(top, tl.max(highest, 0))


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
    BLOCK: tl.constexpr,
):
    # top' = max(top, max z);  shrink = e^(top − top');  e = e^(z − top');
    # total' = shrink total + Σ e;  picked' = picked + z[id − first] if it is here
    row = tl.program_id(0).to(tl.int64)
    old = tl.load(top_ptr + row)
    top = _top_of(z_ptr, row, z_stride, v, old, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, v, BLOCK):
        z, column = _block_of(z_ptr, row, z_stride, start, v, BLOCK)
        e = tl.exp(z - top)
        tl.store(e_ptr + row * v + column, e.to(e_ptr.dtype.element_ty), mask=column < v)
        total += e
    shrink = tl.exp(old - top)
    at = tl.load(id_ptr + row) - first
    here = (at >= 0) & (at < v)
    picked = tl.load(z_ptr + row * z_stride + at, mask=here, other=0.0).to(tl.float32)
    tl.store(new_ptr + row, top)
    tl.store(new_ptr + R + row, tl.load(total_ptr + row) * shrink + tl.sum(total, 0))
    tl.store(new_ptr + 2 * R + row, tl.load(picked_ptr + row) + picked)
    tl.store(new_ptr + 3 * R + row, shrink)


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
    BLOCK: tl.constexpr,
):
    # as _online_softmax_kernel for both rows;  gap' = shrink gap + Σ e_t (t − z), 0 where e_t is 0
    row = tl.program_id(0).to(tl.int64)
    student = row + row // N * N
    teacher = student + N
    old, t_old = tl.load(top_ptr + student), tl.load(top_ptr + teacher)
    top = _top_of(z_ptr, row, z_stride, v, old, BLOCK)
    t_top = _top_of(t_ptr, row, t_stride, v, t_old, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    t_total = tl.zeros((BLOCK,), tl.float32)
    gap = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, v, BLOCK):
        z, column = _block_of(z_ptr, row, z_stride, start, v, BLOCK)
        t, _ = _block_of(t_ptr, row, t_stride, start, v, BLOCK)
        e, t_e = tl.exp(z - top), tl.exp(t - t_top)
        dtype: tl.constexpr = e_ptr.dtype.element_ty
        tl.store(e_ptr + student * v + column, e.to(dtype), mask=column < v)
        tl.store(e_ptr + teacher * v + column, t_e.to(dtype), mask=column < v)
        total += e
        t_total += t_e
        gap += tl.where(t_e > 0, t_e * (t - z), 0.0)
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
    z, column = _block_of(z_ptr, row, z_stride, tl.program_id(1) * BLOCK, v, BLOCK)
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
    z, column = _block_of(z_ptr, row, z_stride, start, v, BLOCK)
    t, _ = _block_of(t_ptr, row, t_stride, start, v, BLOCK)
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


def online_softmax(
    z_GNv: Tensor,
    ids_GN: Tensor,
    first: int,
    top_GN: Tensor,
    total_GN: Tensor,
    picked_GN: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """e^(z − top), top, total, picked and shrink."""
    z = _rows(z_GNv)
    e = torch.empty(z_GNv.shape, dtype=dtype, device=z.device)
    new = torch.empty(4, *ids_GN.shape, dtype=torch.float32, device=z.device)
    statistics = (s.contiguous() for s in (ids_GN, top_GN, total_GN, picked_GN))
    with torch.cuda.device_of(z):
        _online_softmax_kernel[(len(z),)](
            z, *statistics, e, new, *z.shape, z.stride(0), first, **_sweep(z.shape[1])
        )
    return e, *new


def online_kl(
    z_GNv: Tensor,
    teacher_z_GNv: Tensor,
    top_GR: Tensor,
    total_GR: Tensor,
    gap_GN: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """e^(z − top) of both, top, total, gap and shrink."""
    z, t = _rows(z_GNv), _rows(teacher_z_GNv)
    groups, rows, width = z_GNv.shape
    e = torch.empty(groups, 2 * rows, width, dtype=dtype, device=z.device)
    new = torch.empty(3, *top_GR.shape, dtype=torch.float32, device=z.device)
    gap = torch.empty(groups, rows, dtype=torch.float32, device=z.device)
    statistics = (s.contiguous() for s in (top_GR, total_GR, gap_GN))
    with torch.cuda.device_of(z):
        _online_kl_kernel[(len(z),)](
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
    with torch.cuda.device_of(share):
        width = share.shape[2]
        _accumulate_kernel[_grid(share)](sum_GRX, share, shrink, width, **_elementwise(width))
    return sum_GRX


def softmax_minus_one_hot(
    z_GNv: Tensor, lse_GN: Tensor, ids_GN: Tensor, columns: int | Tensor, dtype: torch.dtype
) -> Tensor:
    """e^(z − lse) − onehot(id)."""
    z = _rows(z_GNv)
    b = torch.empty(z_GNv.shape, dtype=dtype, device=z.device)
    ids, (first, columns_ptr) = ids_GN.contiguous(), _columns(columns)
    with torch.cuda.device_of(z):
        _softmax_minus_one_hot_kernel[_grid(b)](
            z,
            lse_GN.contiguous(),
            ids,
            columns_ptr,
            b,
            *b.shape[1:],
            z.stride(0),
            first,
            **_elementwise(b.shape[2]),
        )
    return b


def softmax_difference(
    z_GNv: Tensor,
    lse_GN: Tensor,
    teacher_z_GNv: Tensor,
    teacher_lse_GN: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """e^(z − lse) − e^(teacher z − teacher lse)."""
    z, t = _rows(z_GNv), _rows(teacher_z_GNv)
    f = torch.empty(z_GNv.shape, dtype=dtype, device=z.device)
    lse, t_lse = lse_GN.contiguous(), teacher_lse_GN.contiguous()
    with torch.cuda.device_of(z):
        width = f.shape[2]
        _softmax_difference_kernel[_grid(f)](
            z, lse, t, t_lse, f, width, z.stride(0), t.stride(0), **_elementwise(width)
        )
    return f


def logit_cotangent(
    b_bar_GNv: Tensor,
    center_GN: Tensor,
    weight_GN: Tensor,
    b_GNv: Tensor,
    ids_GN: Tensor,
    columns: int | Tensor,
) -> Tensor:
    """p ∘ (b̄ − center) + weight ∘ b, with b = p − onehot(id), in b's dtype."""
    b_bar, b = _rows(b_bar_GNv), b_GNv.contiguous()
    z_cot = torch.empty_like(b)
    first, columns_ptr = _columns(columns)
    rows = (t.contiguous() for t in (center_GN, weight_GN))
    with torch.cuda.device_of(b):
        _logit_cotangent_kernel[_grid(b)](
            b_bar,
            *rows,
            b,
            ids_GN.contiguous(),
            columns_ptr,
            z_cot,
            *b.shape[1:],
            b_bar.stride(0),
            first,
            **_elementwise(b.shape[2]),
        )
    return z_cot


def _rows(t_GNv: Tensor) -> Tensor:
    """[G·N, v], rows of consecutive elements; of all columns it may be a view."""
    t = t_GNv.flatten(0, 1)
    return t if t.stride(1) == 1 else t.contiguous()


def _columns(columns: int | Tensor) -> tuple[int, Tensor | None]:
    return (columns, None) if isinstance(columns, int) else (0, columns.contiguous())


def _sweep(width: int) -> dict[str, int]:
    """A program to a row."""
    block = min(SWEEP_BLOCK, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": SWEEP_WARPS if block >= 1024 else NUM_WARPS}


def _elementwise(width: int) -> dict[str, int]:
    """A program to a block of columns of a row."""
    return {"BLOCK": min(BLOCK, triton.next_power_of_2(width)), "num_warps": NUM_WARPS}


def _grid(t_GNv: Tensor) -> tuple[int, int]:
    """Of the elementwise kernels."""
    groups, rows, width = t_GNv.shape
    return groups * rows, triton.cdiv(width, _elementwise(width)["BLOCK"])


def compile_cases(_target: str) -> list[dict[str, Any]]:
    """What benchmarks/compile_kernels.py compiles: tiles in bf16 and fp32, of both kinds of
    columns.
    """
    rows = ("lse", "t_lse", "top", "total", "picked", "gap", "new", "new_gap", "sum", "shrink")
    types = {f"{name}_ptr": "*fp32" for name in (*rows, "center", "weight")}
    types |= dict.fromkeys(("id_ptr", "columns_ptr"), "*i64")
    contiguous = {"columns_ptr": None}
    kernels: list[tuple[Any, str, dict[str, Any], dict[str, int]]] = [
        (_online_softmax_kernel, "", {}, _sweep(SWEEP_BLOCK)),
        (_online_kl_kernel, "", {}, _sweep(SWEEP_BLOCK)),
        (_accumulate_kernel, "", {}, _elementwise(BLOCK)),
        (_softmax_difference_kernel, "", {}, _elementwise(BLOCK)),
        (_softmax_minus_one_hot_kernel, "", contiguous, _elementwise(BLOCK)),
        (_softmax_minus_one_hot_kernel, " own columns", {}, _elementwise(BLOCK)),
        (_logit_cotangent_kernel, "", contiguous, _elementwise(BLOCK)),
        (_logit_cotangent_kernel, " own columns", {}, _elementwise(BLOCK)),
    ]
    cases = []
    for dtype in ("bf16", "fp32"):
        for kernel, kind, absent, launch in kernels:
            constexprs = {"BLOCK": launch["BLOCK"], **absent}
            name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
            cases.append(
                {
                    "name": f"{name} {dtype}{kind}",
                    "kernel": kernel,
                    "signature": {
                        n: types.get(n, f"*{dtype}" if n.endswith("_ptr") else "i32")
                        for n in kernel.arg_names
                        if n not in constexprs
                    },
                    "constexprs": constexprs,
                    "aligned": ["v", "z_stride", "t_stride", "stride", "X"],
                    "num_warps": launch["num_warps"],
                    "num_stages": 3,
                }
            )
    return cases
