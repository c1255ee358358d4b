"""The forward of attention: two products of [queries, keys, head dim] for each pair of blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    LN_2,
    LOG2_E,
    add_dot,
    dot_t,
    first_keys,
    key_blocks,
    load,
    query_program,
    store,
    store_row,
    visible,
)

# Finite, so that rows that have seen no key yet rescale by exp2(0) and not by exp2(−∞ + ∞).
LOWEST = tl.constexpr(-1e38)


@triton.jit(do_not_specialize=["T"])
def attention_forward_kernel(
    q,  # [B, H, T, D] in
    k,  # [B, K, T, D] in, q's dtype
    v,  # [B, K, T, D] in, q's dtype
    out,  # [B, H, T, D] out, q's dtype
    lse,  # [B, H, T] out, fp32
    first_key_ptr,  # [B, T] in, int32, if BOUNDED
    H,
    G,
    T,
    scale,  # not negative
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # O = P V, with P = softmax(scale Q Kᵀ + mask), and lse = log rowsum exp(scale Q Kᵀ + mask)
    batch, head, kv_head, first = query_program(H, G, BLOCK_M)
    begin, full_begin, full_end, end = key_blocks(
        first_key_ptr, batch, first, T, BLOCK_M, BLOCK_N, BOUNDED, SPLIT
    )
    query = first + tl.arange(0, BLOCK_M)
    first_key = first_keys(first_key_ptr, batch, query, T, BOUNDED)
    q_tile = load(q, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = top, total, acc
    seen = query[:, None], first_key[:, None], q_tile
    keys = k, v, batch, kv_head, T
    sums = _attend(sums, seen, keys, full_end, end, scale, D, BLOCK_D, BLOCK_N, True, BOUNDED)
    if SPLIT:
        sums = _attend(
            sums, seen, keys, full_begin, full_end, scale, D, BLOCK_D, BLOCK_N, False, False
        )
        if BOUNDED:
            sums = _attend(
                sums, seen, keys, begin, full_begin, scale, D, BLOCK_D, BLOCK_N, True, True
            )
    top, total, acc = sums
    store_row(lse, (top + tl.log2(total)) * LN_2, batch, head, first, T, BLOCK_M)
    store(out, acc / total[:, None], batch, head, first, T, D, BLOCK_M, BLOCK_D)


@triton.jit
def _attend(
    sums,
    queries,
    keys,
    begin,
    end,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    # the largest score in bits, the sum of powers of two, and O times it, with more keys
    top, total, acc = sums
    query, first_key, q_tile = queries
    k, v, batch, kv_head, T = keys
    for back in range(0, end - begin, BLOCK_N):
        start = end - BLOCK_N - back
        k_tile = load(k, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        v_tile = load(v, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        bits = scale * LOG2_E
        s = dot_t(q_tile, k_tile)
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)[None, :]
            s = tl.where(visible(query, first_key, key, BOUNDED), s * bits, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
        else:  # one multiply-add less: the scale is not negative
            new_top = tl.maximum(top, tl.max(s, 1) * bits)
            p = tl.exp2(s * bits - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, 1)
        acc = add_dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None])
        top = new_top
    return top, total, acc
