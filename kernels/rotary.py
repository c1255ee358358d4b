"""Rotary position embedding: both passes of ops/rotary.py, a program for each token's heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import run_kernel
from .sizes import next_power_of_2

TILE_ELEMENTS = 1024  # of half a rotated head, over the heads taken at once
NUM_WARPS = 8  # with four, ptxas spills on sm_100


@triton.jit
def _rotate_heads(
    x_ptr,  # [B, H, T, D] in
    y_ptr,  # [B, H, T, D] out
    x_strides,
    y_strides,
    batch,
    token,
    H,
    table,  # cos1, cos2, to1 and to2 of the token, [BLOCK_R], fp32
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    # y1 = x1 cos1 + x2 to1;  y2 = x2 cos2 + x1 to2;  the rest of x as it is
    cos_1, cos_2, to_1, to_2 = table
    x_ptr += batch * x_strides[0] + token * x_strides[2]
    y_ptr += batch * y_strides[0] + token * y_strides[2]
    column = tl.arange(0, BLOCK_R)[None, :]
    rest = tl.arange(0, BLOCK_REST)[None, :]
    for first in range(0, H, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)[:, None]
        x_head_ptr = x_ptr + head.to(tl.int64) * x_strides[1]
        y_head_ptr = y_ptr + head.to(tl.int64) * y_strides[1]
        live = (head < H) & (column < HALF)
        x_1 = tl.load(x_head_ptr + column, mask=live, other=0.0).to(tl.float32)
        x_2 = tl.load(x_head_ptr + HALF + column, mask=live, other=0.0).to(tl.float32)
        y_1 = x_1 * cos_1[None, :] + x_2 * to_1[None, :]
        y_2 = x_2 * cos_2[None, :] + x_1 * to_2[None, :]
        tl.store(y_head_ptr + column, y_1.to(y_ptr.dtype.element_ty), mask=live)
        tl.store(y_head_ptr + HALF + column, y_2.to(y_ptr.dtype.element_ty), mask=live)
        if REST > 0:
            live = (head < H) & (rest < REST)
            kept = tl.load(x_head_ptr + 2 * HALF + rest, mask=live, other=0.0)
            tl.store(y_head_ptr + 2 * HALF + rest, kept, mask=live)


@triton.jit(do_not_specialize=["T"])
def _rotary_kernel(
    q_ptr,  # [B, H, T, D] in
    k_ptr,  # [B, K, T, D] in
    cos_ptr,  # [B or 1, T, R] in
    sin_ptr,  # [B or 1, T, R] in
    q_out_ptr,  # [B, H, T, D] out, q's dtype
    k_out_ptr,  # [B, K, T, D] out, k's dtype
    q_strides,  # of batch, head, token; the others likewise
    k_strides,
    q_out_strides,
    k_out_strides,
    cos_stride,  # of batch
    sin_stride,
    H,
    K,
    T,
    ADJOINT: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    # the adjoint: x1 = y1 cos1 + y2 sin2;  x2 = y2 cos2 − y1 sin1
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // T, program % T
    column = tl.arange(0, BLOCK_R)
    live = column < HALF
    cos_ptr += batch * cos_stride + token * (2 * HALF)
    sin_ptr += batch * sin_stride + token * (2 * HALF)
    cos_1 = tl.load(cos_ptr + column, mask=live, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + HALF + column, mask=live, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + column, mask=live, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + HALF + column, mask=live, other=0.0).to(tl.float32)
    to_1, to_2 = (sin_2, -sin_1) if ADJOINT else (-sin_1, sin_2)
    table = (cos_1, cos_2, to_1, to_2)
    _rotate_heads(q_ptr, q_out_ptr, q_strides, q_out_strides, batch, token, H, table,
                  HALF, REST, BLOCK_H, BLOCK_R, BLOCK_REST)  # fmt: skip
    _rotate_heads(k_ptr, k_out_ptr, k_strides, k_out_strides, batch, token, K, table,
                  HALF, REST, BLOCK_K, BLOCK_R, BLOCK_REST)  # fmt: skip


def rotary_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x ∘ cos + rotate_half(x) ∘ sin for q and k."""
    return _launch(q, k, cos, sin, adjoint=False)


def rotary_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of q and k."""
    return _launch(dq, dk, cos, sin, adjoint=True)


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, adjoint: bool) -> tuple[Tensor, Tensor]:
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    q_out, k_out = _token_major(q), _token_major(k)
    batch, heads, tokens, dim = q.shape
    run_kernel(
        _rotary_kernel,
        (batch * tokens,),
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        *(t.stride()[:3] for t in (q, k, q_out, k_out)),
        *(0 if len(t) == 1 else t.stride(0) for t in (cos, sin)),
        heads,
        k.shape[1],
        tokens,
        ADJOINT=adjoint,
        **_tile(heads, k.shape[1], dim, cos.shape[-1]),
    )
    return q_out, k_out


def _token_major(x: Tensor) -> Tensor:
    """A fresh tensor as x [B, H, T, D], in memory [B, T, H, D] as the projections around it are."""
    batch, heads, tokens, dim = x.shape
    fresh = torch.empty((batch, tokens, heads, dim), dtype=x.dtype, device=x.device)
    return fresh.transpose(1, 2)


def _tile(heads: int, kv_heads: int, dim: int, rotated: int) -> dict[str, int]:
    """The compile-time constants for this many heads of queries and keys of this size."""
    block_r = next_power_of_2(rotated // 2)
    most = max(1, TILE_ELEMENTS // block_r)
    return {
        "HALF": rotated // 2,
        "REST": dim - rotated,
        "BLOCK_H": min(next_power_of_2(heads), most),
        "BLOCK_K": min(next_power_of_2(kv_heads), most),
        "BLOCK_R": block_r,
        "BLOCK_REST": next_power_of_2(max(1, dim - rotated)),
        "num_warps": NUM_WARPS,
    }
