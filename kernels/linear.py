"""The fused inner update: a product with every group's own weights, in one accumulator and one
write.

A block of rows may meet several groups: it runs over all of
theirs, and a group's matches are zero outside its rows, because a tile is zero wherever it leaves
its matrix, before the first row as well. Where there are few blocks of outputs, SPLIT programs
share the sum of one, and a second kernel adds their parts, always in the same order.

Which sizes run where, and where cuBLAS does better, is a table of its own: ``linear_tiles.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .copy_engine import begins_aligned, describable
from .launching import descriptor, run_kernel
from .linear_tiles import Tiles, choose_tiles
from .sizes import cdiv

SUM_BLOCK = 1024  # of _sum_parts_kernel


@triton.jit
def _tile(
    source,  # [G, rows, columns] in; a descriptor if TMA, else a pointer
    g,
    row,
    column,
    rows,
    columns,
    stride,  # of a row; a column's is 1
    TMA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # source[g, row : row + BLOCK_R, column : column + BLOCK_C], zero outside of source[g]
    if TMA:
        return source.load([g, row, column]).reshape(BLOCK_R, BLOCK_C)
    else:
        r, c = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
        inside = ((r >= 0) & (r < rows))[:, None] & (c < columns)[None, :]
        first = source + tl.cast(g, tl.int64) * rows * stride
        return tl.load(first + r.to(tl.int64)[:, None] * stride + c[None, :], inside, other=0.0)


@triton.jit
def _add_product(
    acc,
    x,
    w,
    row,
    o,
    i,
    ROWS,
    I,
    O,
    stride_w,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # acc[r, o] += Σ_i x[r, i] w[o, i] over one block of inputs
    x_tile = _tile(x, 0, row, i, ROWS, I, I, TMA, acc.shape[0], BLOCK_I)
    if TRANSPOSED:
        w_tile = _tile(w, 0, i, o, I, O, stride_w, TMA, BLOCK_I, acc.shape[1])
    else:
        w_tile = _tile(w, 0, o, i, O, I, stride_w, TMA, acc.shape[1], BLOCK_I).T
    return tl.dot(x_tile, w_tile, acc, input_precision="ieee")


@triton.jit
def _add_update(acc, a, e, row, o, g, s, M, O, S, TMA: tl.constexpr, BLOCK_S: tl.constexpr):
    # acc[r, o] += Σ_s a[r, s] e[g, s, o] over one block of contexts, at the rows of group g
    a_tile = _tile(a, g, row - g * M, s, M, S, S, TMA, acc.shape[0], BLOCK_S)
    e_tile = _tile(e, g, s, o, S, O, O, TMA, BLOCK_S, acc.shape[1])
    return tl.dot(a_tile, e_tile, acc, input_precision="ieee")


@triton.jit
def _steps_of_update(row, ROWS, M, S, part, SPLIT, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    # First group of these rows, and this part's steps over the contexts of all their groups
    first, last = row // M, (tl.minimum(row + BLOCK_R, ROWS) - 1) // M
    steps = tl.maximum(last - first + 1, 0) * tl.cdiv(S, BLOCK_S)
    return first, steps * part // SPLIT, steps * (part + 1) // SPLIT


@triton.jit
def _add_updates(
    acc,
    a,
    e,
    row,
    o,
    part,
    ROWS,
    M,
    O,
    S,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # acc[r, o] += Σ_s a[r, s] e[r // M, s, o] over this part's steps
    first, u, end_u = _steps_of_update(row, ROWS, M, S, part, SPLIT, acc.shape[0], BLOCK_S)
    steps_s = tl.cdiv(S, BLOCK_S)
    for step in range(u, end_u):
        g, s = first + step // steps_s, step % steps_s * BLOCK_S
        acc = _add_update(acc, a, e, row, o, g, s, M, O, S, TMA, BLOCK_S)
    return acc


# Sizes that change from batch to batch are not specialised on, here and in the other kernels: each
# value would compile again.
@triton.jit(do_not_specialize=["ROWS", "M"])
def _updated_product_kernel(
    x,  # [1, G·M, I] in; these four are descriptors if TMA
    w,  # [1, O, I] in, x's dtype; [1, I, O] if TRANSPOSED
    a,  # [G, M, S] in, x's dtype: −η (x Xᵀ + 1)
    e,  # [G, S, O] in, x's dtype
    b_ptr,  # [O] in, if HAS_BIAS
    y_ptr,  # [G·M, O] out, x's dtype; if SPLIT > 1 [SPLIT, G·M, O] out, fp32, without b
    ROWS,
    M,
    I,
    O,
    S,
    stride_w,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    HALVED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # y[r, o] = Σ_i x[r, i] w[o, i] + b[o] + Σ_s a[r, s] e[r // M, s, o]

    # Neighbouring programs share their columns of w and e, for up to eight blocks of rows: these
    # come from memory once.
    column_blocks = tl.cdiv(O, BLOCK_O)
    band, within = tl.program_id(0) // (8 * column_blocks), tl.program_id(0) % (8 * column_blocks)
    height = tl.minimum(tl.cdiv(ROWS, BLOCK_R) - 8 * band, 8)
    row, o = (8 * band + within % height) * BLOCK_R, within // height * BLOCK_O

    part = tl.program_id(1)
    i, end_i = tl.cdiv(I, BLOCK_I) * part // SPLIT, tl.cdiv(I, BLOCK_I) * (part + 1) // SPLIT
    r, column = row + tl.arange(0, BLOCK_R), o + tl.arange(0, BLOCK_O)
    in_r, in_o = r < ROWS, column < O

    acc = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.float32)
    if HALVED:  # each half of the rows meets fewer groups
        half: tl.constexpr = BLOCK_R // 2
        top, low = acc.reshape(2, half, BLOCK_O).permute(1, 2, 0).split()
        top = _add_updates(top, a, e, row, o, part, ROWS, M, O, S, SPLIT, TMA, BLOCK_S)
        low = _add_updates(low, a, e, row + half, o, part, ROWS, M, O, S, SPLIT, TMA, BLOCK_S)
        acc = tl.join(top, low).permute(2, 0, 1).reshape(BLOCK_R, BLOCK_O)
    else:
        acc = _add_updates(acc, a, e, row, o, part, ROWS, M, O, S, SPLIT, TMA, BLOCK_S)
    for step in range(i, end_i):
        k = step * BLOCK_I
        acc = _add_product(acc, x, w, row, o, k, ROWS, I, O, stride_w, TRANSPOSED, TMA, BLOCK_I)
    if HAS_BIAS and SPLIT == 1:
        acc += tl.load(b_ptr + column, mask=in_o, other=0.0).to(tl.float32)[None, :]
    y_row = (part.to(tl.int64) * ROWS + r)[:, None] * O
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_row + column[None, :], y, mask=in_r[:, None] & in_o[None, :])


@triton.jit(do_not_specialize=["ROWS"])
def _sum_parts_kernel(
    parts_ptr,  # [SPLIT, ROWS, O] in, fp32
    b_ptr,  # [O] in, if HAS_BIAS
    y_ptr,  # [ROWS, O] out
    ROWS,
    O,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # y[r, o] = Σ_p parts[p, r, o] + b[o]
    size = tl.cast(ROWS, tl.int64) * O
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + part * size + n, mask=n < size, other=0.0)
    if HAS_BIAS:
        total += tl.load(b_ptr + n % O, mask=n < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, total.to(y_ptr.dtype.element_ty), mask=n < size)


def updated_product(
    x_GMI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, match_GMS: Tensor, factor_GSO: Tensor
) -> Tensor:
    """y = x Wᵀ + b + match · E of every group, [G, M, O]."""
    tiles = choose_tiles(x_GMI, factor_GSO)
    if tiles is not None:
        return fused_product(x_GMI, weight_OI, bias_O, match_GMS, factor_GSO, tiles)
    y = torch.nn.functional.linear(x_GMI, weight_OI, bias_O)
    return y.baddbmm_(match_GMS, factor_GSO)


def fused_product(
    x_GMI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    match_GMS: Tensor,
    factor_GSO: Tensor,
    tiles: Tiles,
) -> Tensor:
    """``updated_product`` by the kernel, with these tiles."""
    groups, rows, inputs = x_GMI.shape
    context, outputs = factor_GSO.shape[1:]
    transposed = weight_OI.stride(1) != 1
    weight = weight_OI.T if transposed else weight_OI
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    operands = [x_GMI.contiguous(), weight, match_GMS.contiguous(), factor_GSO.contiguous()]
    tma = tiles.tma and _describable(operands)
    if tma:
        operands = _descriptors(operands, transposed, tiles)
    parts = y = x_GMI.new_empty(groups, rows, outputs)
    if tiles.split > 1:
        parts = y.new_empty(tiles.split, groups * rows, outputs, dtype=torch.float32)
    blocks = cdiv(groups * rows, tiles.rows) * cdiv(outputs, tiles.outputs)
    bias = bias_O if bias_O is not None else y
    run_kernel(
        _updated_product_kernel,
        (blocks, tiles.split),
        *operands,
        bias,
        parts,
        groups * rows,
        rows,
        inputs,
        outputs,
        context,
        weight.stride(0),
        HAS_BIAS=bias_O is not None,
        TRANSPOSED=transposed,
        TMA=tma,
        **tiles.constexprs(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if tiles.split > 1:
        run_kernel(
            _sum_parts_kernel,
            (cdiv(y.numel(), SUM_BLOCK),),
            parts,
            bias,
            y,
            groups * rows,
            outputs,
            HAS_BIAS=bias_O is not None,
            SPLIT=tiles.split,
            BLOCK=SUM_BLOCK,
        )
    return y


def _describable(operands: list[Tensor]) -> bool:
    """Whether the bulk copy engine reads them. The matches' rows are made so (``_descriptors``)."""
    x, weight, match, factor = operands
    return all(map(describable, (x, weight, factor))) and begins_aligned(match)


def _descriptors(operands: list[Tensor], transposed: bool, tiles: Tiles) -> list[Any]:
    """Of [1, G·M, I], [1, O, I] or [1, I, O], [G, M, S] and [G, S, O]."""
    x, weight, match, factor = operands
    if odd := match.shape[2] * match.element_size() % 16:
        match = torch.nn.functional.pad(match, (0, (16 - odd) // match.element_size()))
    weight_block = (tiles.outputs, tiles.inputs)
    blocks = [
        (x.view(1, -1, x.shape[2]), (tiles.rows, tiles.inputs)),
        (weight[None], weight_block[::-1] if transposed else weight_block),
        (match, (tiles.update_rows, tiles.context)),
        (factor, (tiles.context, tiles.outputs)),
    ]
    return [descriptor(tensor, [1, *block]) for tensor, block in blocks]
