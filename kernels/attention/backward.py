"""The backward of attention, in two kernels: seven products of [queries, keys, head dim] for each
pair of blocks, three by query and four by key. Five are the fewest there can be; the other two are
the price of one writer for every output, so that the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    add_dot,
    dot_t,
    first_keys,
    key_blocks,
    key_program,
    load,
    load_row,
    next_queries,
    probabilities,
    query_blocks,
    query_program,
    row_dot,
    store,
    store_row,
)


@triton.jit(do_not_specialize=["T"])
def attention_backward_query_kernel(
    do,  # [B, H, T, D] in, q's dtype
    q,  # [B, H, T, D] in
    out,  # [B, H, T, D] in, q's dtype
    k,  # [B, K, T, D] in, q's dtype
    v,  # [B, K, T, D] in, q's dtype
    dq,  # [B, H, T, D] out, q's dtype; added to, if ADD
    lse,  # [B, H, T] in, fp32
    delta,  # [B, H, T] out, fp32
    first_key_ptr,  # [B, T] in, int32, if BOUNDED
    H,
    G,
    T,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    SPLIT: tl.constexpr,
    ADD: tl.constexpr,
):
    # dQ = scale dS K, with dS = P ∘ (dP − δ), dP = dO Vᵀ, δ = rowsum(dO ∘ O)
    batch, head, kv_head, first = query_program(H, G, BLOCK_M)
    begin, full_begin, full_end, end = key_blocks(
        first_key_ptr, batch, first, T, BLOCK_M, BLOCK_N, BOUNDED, SPLIT
    )
    query = first + tl.arange(0, BLOCK_M)
    first_key = first_keys(first_key_ptr, batch, query, T, BOUNDED)
    do_tile = load(do, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    q_tile = load(q, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    delta_row = row_dot(do_tile, load(out, batch, head, first, T, D, BLOCK_M, BLOCK_D))
    store_row(delta, delta_row, batch, head, first, T, BLOCK_M)
    lse_row = load_row(lse, batch, head, first, T, BLOCK_M)
    queries = query, first_key, do_tile, q_tile, lse_row, delta_row
    keys = k, v, batch, kv_head, T
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _add_keys(acc, queries, keys, full_end, end, scale, D, BLOCK_D, BLOCK_N, True, BOUNDED)
    if SPLIT:
        acc = _add_keys(
            acc, queries, keys, full_begin, full_end, scale, D, BLOCK_D, BLOCK_N, False, False
        )
        if BOUNDED:
            acc = _add_keys(
                acc, queries, keys, begin, full_begin, scale, D, BLOCK_D, BLOCK_N, True, True
            )
    store(dq, acc * scale, batch, head, first, T, D, BLOCK_M, BLOCK_D, ADD)


@triton.jit
def _add_keys(
    acc,
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
    # dQ / scale with more keys
    query, first_key, do_tile, q_tile, lse_row, delta_row = queries
    k, v, batch, kv_head, T = keys
    for back in range(0, end - begin, BLOCK_N):
        start = end - BLOCK_N - back
        k_tile = load(k, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        v_tile = load(v, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        s = dot_t(q_tile, k_tile)
        p = probabilities(
            s, query[:, None], first_key[:, None], key, lse_row[:, None], scale, MASKED, BOUNDED
        )
        ds = p * (dot_t(do_tile, v_tile) - delta_row[:, None])
        acc = add_dot(ds.to(k_tile.dtype), k_tile, acc)
    return acc


@triton.jit(do_not_specialize=["T"])
def attention_backward_key_kernel(
    do,  # [B, H, T, D] in, q's dtype
    q,  # [B, H, T, D] in
    k,  # [B, K, T, D] in, q's dtype
    v,  # [B, K, T, D] in, q's dtype
    dk,  # [B, K, T, D] out, q's dtype; added to, if ADD
    dv,  # [B, K, T, D] out, q's dtype; added to, if ADD
    lse,  # [B, H, T] in, fp32
    delta,  # [B, H, T] in, fp32
    first_key_ptr,  # [B, T] in, int32, if BOUNDED; the last queries likewise
    last_query_ptr,
    H,
    G,
    T,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    SPLIT: tl.constexpr,
    ADD: tl.constexpr,
):
    # dK = scale dSᵀ Q,  dV = Pᵀ dO, summed over the heads of the group; tiles are [keys, queries]
    batch, kv_head, first = key_program(H, G, BLOCK_N)
    begin, full_begin, full_end, end = query_blocks(
        last_query_ptr, batch, first, T, BLOCK_M, BLOCK_N, BOUNDED, SPLIT
    )
    key = first + tl.arange(0, BLOCK_N)[:, None]
    k_tile = load(k, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    v_tile = load(v, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    keys = key, k_tile, v_tile
    queries = do, q, lse, delta, first_key_ptr, batch, kv_head, G, T
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sums = dk_acc, dv_acc
    sums = _add_queries(
        sums, keys, queries, begin, full_begin, scale, D, BLOCK_D, BLOCK_M, True, BOUNDED
    )
    if SPLIT:
        sums = _add_queries(
            sums, keys, queries, full_begin, full_end, scale, D, BLOCK_D, BLOCK_M, False, False
        )
        if BOUNDED:
            sums = _add_queries(
                sums, keys, queries, full_end, end, scale, D, BLOCK_D, BLOCK_M, True, True
            )
    dk_acc, dv_acc = sums
    store(dk, dk_acc * scale, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D, ADD)
    store(dv, dv_acc, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D, ADD)


@triton.jit
def _add_queries(
    sums,
    keys,
    queries,
    begin,
    end,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    # dK / scale and dV with more queries, of every head of the group
    dk_acc, dv_acc = sums
    key, k_tile, v_tile = keys
    do, q, lse, delta, first_key_ptr, batch, kv_head, G, T = queries
    head = kv_head * G
    start = begin
    for _ in range(0, G * ((end - begin) // BLOCK_M)):
        query = start + tl.arange(0, BLOCK_M)
        first_key = first_keys(first_key_ptr, batch, query, T, BOUNDED)[None, :]
        do_tile = load(do, batch, head, start, T, D, BLOCK_M, BLOCK_D)
        q_tile = load(q, batch, head, start, T, D, BLOCK_M, BLOCK_D)
        lse_row = load_row(lse, batch, head, start, T, BLOCK_M)[None, :]
        delta_row = load_row(delta, batch, head, start, T, BLOCK_M)[None, :]
        s = dot_t(k_tile, q_tile)
        p = probabilities(s, query[None, :], first_key, key, lse_row, scale, MASKED, BOUNDED)
        dv_acc = add_dot(p.to(do_tile.dtype), do_tile, dv_acc)
        ds = p * (dot_t(v_tile, do_tile) - delta_row)
        dk_acc = add_dot(ds.to(q_tile.dtype), q_tile, dk_acc)
        head, start = next_queries(head, start, begin, end, BLOCK_M)
    return dk_acc, dv_acc
