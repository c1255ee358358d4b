"""A low-rank weight of every group's own: its product and its update. Shapes as in ops/lora.py.

One side of the weight is a LoRA rank; blocks of a short side are padded to 16, the least that the
matrix units take.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import run_kernel
from .sizes import cdiv, next_power_of_2

if TYPE_CHECKING:
    from ..rows import GroupedRows

LAUNCH = dict(num_warps=4, num_stages=3)


@triton.jit(do_not_specialize=["T", "P"])
def _lora_product_kernel(
    x_ptr,  # [B, T, I] in
    w_ptr,  # [O, I] in, x's dtype, any strides; or None
    own_ptr,  # [G, O, I] in, fp32, any strides
    group_ptr,  # [B] in, int64
    y_ptr,  # [B, T, O] out, x's dtype
    T,
    I,
    O,
    P,  # programs for each b
    stride_wo,
    stride_wi,
    stride_g,
    stride_o,
    stride_i,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # y[b, t, o] = Σ_i x[b, t, i] w[o, i] + Σ_i x[b, t, i] (own[g, o, i] − w[o, i]),  g = group[b]
    program = tl.program_id(0).to(tl.int64)
    b = program // P
    t = (program % P) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_t, in_o = (t < T)[:, None], (o < O)[None, :]
    group = tl.load(group_ptr + b)
    acc = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for start in range(0, I, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I).to(tl.int64)
        in_w = (i < I)[:, None] & in_o
        x = tl.load(
            x_ptr + (b * T + t)[:, None] * I + i[None, :], mask=in_t & (i < I)[None, :], other=0.0
        )
        change = tl.load(
            own_ptr + group * stride_g + o[None, :] * stride_o + i[:, None] * stride_i,
            mask=in_w,
            other=0.0,
        )
        if w_ptr is not None:
            w = tl.load(
                w_ptr + o[None, :] * stride_wo + i[:, None] * stride_wi, mask=in_w, other=0.0
            )
            acc = tl.dot(x, w, acc)
            change -= w.to(tl.float32)
        acc = tl.dot(x, change.to(x.dtype), acc, input_precision="ieee")
    at = (b * T + t)[:, None] * O + o[None, :]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=in_t & in_o)


@triton.jit(do_not_specialize=["T"])
def _lora_materialise_kernel(
    own_ptr,  # [G, O, I] in, fp32, any strides; or None
    e_ptr,  # [B, T, O] in
    x_ptr,  # [B, T, I] in
    order_ptr,  # [B] in, int64: the rows of group g are order[offset[g]:offset[g + 1]]
    offset_ptr,  # [G + 1] in, int64
    after_ptr,  # [G, O, I] out, fp32
    T,
    I,
    O,
    stride_g,
    stride_o,
    stride_i,
    scale,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # after[g, o, i] = own[g, o, i] + scale Σ_s e[s, o] x[s, i] over the tokens s of group g
    group = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(2).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    first = tl.load(offset_ptr + group)
    tokens = (tl.load(offset_ptr + group + 1) - first) * T
    acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        b = tl.load(order_ptr + first + s // T, mask=s < tokens, other=0)
        token = b * T + s % T
        e = tl.load(
            e_ptr + token[None, :] * O + o[:, None],
            mask=(s < tokens)[None, :] & (o < O)[:, None],
            other=0.0,
        )
        x = tl.load(
            x_ptr + token[:, None] * I + i[None, :],
            mask=(s < tokens)[:, None] & (i < I)[None, :],
            other=0.0,
        )
        acc = tl.dot(e, x, acc, input_precision="ieee")
    acc *= scale
    live = (o < O)[:, None] & (i < I)[None, :]
    if own_ptr is not None:
        at = group * stride_g + o[:, None] * stride_o + i[None, :] * stride_i
        acc += tl.load(own_ptr + at, mask=live, other=0.0)
    tl.store(after_ptr + (group * O + o[:, None]) * I + i[None, :], acc, mask=live)


def lora_product(x: Tensor, weight_OI: Tensor | None, own_GOI: Tensor, rows: GroupedRows) -> Tensor:
    """y[b] = x[b] W'ᵀ of row b's group; in half precision x[b] Wᵀ + x[b] (W' − W)ᵀ."""
    x = x.contiguous()
    B, *tokens, I = x.shape
    T, O = math.prod(tokens), own_GOI.shape[1]
    w = weight_OI if x.dtype != own_GOI.dtype else None
    y = x.new_empty(*x.shape[:-1], O)
    blocks = _product_blocks(T, I, O)
    programs = cdiv(T, blocks["BLOCK_T"])
    run_kernel(
        _lora_product_kernel,
        (B * programs, cdiv(O, blocks["BLOCK_O"])),
        x,
        w,
        own_GOI,
        rows.group_B,
        y,
        T,
        I,
        O,
        programs,
        *(w.stride() if w is not None else (0, 0)),
        *own_GOI.stride(),
        **blocks,
        **LAUNCH,
    )
    return y


def lora_materialise(
    own_GOI: Tensor | None, e: Tensor, x: Tensor, rows: GroupedRows, scale: float
) -> Tensor:
    """W'_g + scale · Σ e[b]ᵀ x[b] over the rows b and tokens of group g, in fp32."""
    e, x = e.contiguous(), x.contiguous()
    _, *tokens, I = x.shape
    O = e.shape[-1]
    after_GOI = x.new_empty(rows.groups, O, I, dtype=torch.float32)
    blocks = _materialise_blocks(I, O)
    grid = rows.groups, cdiv(O, blocks["BLOCK_O"]), cdiv(I, blocks["BLOCK_I"])
    run_kernel(
        _lora_materialise_kernel,
        grid,
        own_GOI,
        e,
        x,
        rows.order_B,
        rows.offset_G,
        after_GOI,
        math.prod(tokens),
        I,
        O,
        *(own_GOI.stride() if own_GOI is not None else (0, 0, 0)),
        scale,
        **blocks,
        **LAUNCH,
    )
    return after_GOI


def _block(size: int, most: int) -> int:
    return min(most, max(16, next_power_of_2(size)))


def _product_blocks(T: int, I: int, O: int) -> dict[str, int]:
    return dict(BLOCK_T=_block(T, 64), BLOCK_O=_block(O, 64), BLOCK_I=_block(I, 64))


def _materialise_blocks(I: int, O: int) -> dict[str, int]:
    return dict(BLOCK_O=_block(O, 64), BLOCK_I=_block(I, 64), BLOCK_S=64)
