"""The double backward of attention, in two kernels: 19 products of [queries, keys, head dim] for
each pair of blocks, eleven by query and eight by key. Twelve are the fewest there can be; five make
the scores and their tangents a second time, for one writer of every output, and two sum dS K and
P K in the same sweep as the row statistics σ and τ. Where registers are too few for that, σ and τ
have a sweep of their own before, and it is 22.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    add_dot,
    dot,
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
    scores_tangent,
    store,
    store_row,
)


@triton.jit(do_not_specialize=["T"])
def attention_double_backward_query_kernel(
    cot_dq,  # [B, H, T, D] in, q's dtype: Q̇
    do,  # [B, H, T, D] in, q's dtype
    q,  # [B, H, T, D] in
    out,  # [B, H, T, D] in, q's dtype
    cot_dk,  # [B, K, T, D] in, q's dtype: K̇
    cot_dv,  # [B, K, T, D] in, q's dtype: V̇
    k,  # [B, K, T, D] in, q's dtype
    v,  # [B, K, T, D] in, q's dtype
    cot_do,  # [B, H, T, D] out, q's dtype
    cot_q,  # [B, H, T, D] out, q's dtype
    lse,  # [B, H, T] in, fp32
    delta,  # [B, H, T] out, fp32; σ and τ likewise
    sigma,
    tau,
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
    SWEEPS: tl.constexpr,
):
    # cot dO = Ṗ V + P V̇,  cot Q = scale (S̄ K + dS K̇), with Ṡ = scale (Q̇ Kᵀ + Q K̇ᵀ),
    # Ṗ = P ∘ (Ṡ − σ),  dS = P ∘ (dP − δ),  S̄ = P ∘ (P̄ − τ),  P̄ = (dP − δ) ∘ (Ṡ − σ) + dO V̇ᵀ,
    # σ = rowsum(P ∘ Ṡ),  τ = rowsum(P ∘ P̄).
    # One sweep takes σ₀ and τ₀ for σ and τ, and what they are short of is made up at its end:
    # Ṗ V = (P ∘ (Ṡ − σ₀)) V − (σ − σ₀) O,  S̄ K = X K − (σ − σ₀) dS K − (τ − τ₀) P K,
    # X = P ∘ ((dP − δ) ∘ (Ṡ − σ₀) + dO V̇ᵀ − τ₀),  τ − τ₀ = rowsum(X).
    batch, head, kv_head, first = query_program(H, G, BLOCK_M)
    blocks = key_blocks(first_key_ptr, batch, first, T, BLOCK_M, BLOCK_N, BOUNDED, SPLIT)
    query = first + tl.arange(0, BLOCK_M)
    first_key = first_keys(first_key_ptr, batch, query, T, BOUNDED)
    qd_tile = load(cot_dq, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    do_tile = load(do, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    q_tile = load(q, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    delta_row = row_dot(do_tile, load(out, batch, head, first, T, D, BLOCK_M, BLOCK_D))
    store_row(delta, delta_row, batch, head, first, T, BLOCK_M)
    lse_row = load_row(lse, batch, head, first, T, BLOCK_M)
    zero = tl.zeros([BLOCK_M], tl.float32)
    no_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = zero, zero, zero, zero, no_sum, no_sum, no_sum, no_sum
    queries = query, first_key, qd_tile, do_tile, q_tile, lse_row, delta_row
    keys = cot_dk, cot_dv, k, v, batch, kv_head, T
    if SWEEPS == 2:
        sums = _sweep(
            *(sums, queries, keys, blocks, scale),
            *(D, BLOCK_D, BLOCK_N, True, False, BOUNDED, SPLIT),
        )
        sigma_0, tau_0, d_sigma, d_tau, _, _, _, _ = sums
        sums = sigma_0 + d_sigma, tau_0 + d_tau, zero, zero, no_sum, no_sum, no_sum, no_sum
    sums = _sweep(
        *(sums, queries, keys, blocks, scale),
        *(D, BLOCK_D, BLOCK_N, SWEEPS == 1, True, BOUNDED, SPLIT),
    )
    sigma_0, tau_0, d_sigma, d_tau, cot_do_acc, cot_q_acc, ds_k, p_k = sums
    store_row(sigma, sigma_0 + d_sigma, batch, head, first, T, BLOCK_M)
    store_row(tau, tau_0 + d_tau, batch, head, first, T, BLOCK_M)
    if SWEEPS == 1:
        out_tile = load(out, batch, head, first, T, D, BLOCK_M, BLOCK_D).to(tl.float32)
        cot_do_acc -= d_sigma[:, None] * out_tile
        cot_q_acc -= d_sigma[:, None] * ds_k + d_tau[:, None] * p_k
    store(cot_do, cot_do_acc, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    store(cot_q, cot_q_acc * scale, batch, head, first, T, D, BLOCK_M, BLOCK_D)


@triton.jit
def _sweep(
    sums,
    queries,
    keys,
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
    BOUNDED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # all keys of a block of queries: the row statistics, the sums, or both at once
    begin, full_begin, full_end, end = blocks
    sums = _add_keys(
        *(sums, queries, keys, full_end, end, scale),
        *(D, BLOCK_D, BLOCK_N, ROWS, SUMS, ROWS, True, BOUNDED),
    )
    if SPLIT:
        sums = _add_keys(
            *(sums, queries, keys, full_begin, full_end, scale),
            *(D, BLOCK_D, BLOCK_N, ROWS, SUMS, False, False, False),
        )
        if BOUNDED:
            sums = _add_keys(
                *(sums, queries, keys, begin, full_begin, scale),
                *(D, BLOCK_D, BLOCK_N, ROWS, SUMS, False, True, True),
            )
    return sums


@triton.jit
def _add_keys(
    sums,
    queries,
    keys,
    begin,
    end,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
    OWN: tl.constexpr,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    # More keys, from the last to the first. With OWN the queries' own keys are among them, each the
    # first that its query sees: σ₀ and τ₀ are Ṡ and dO V̇ᵀ there, since sums of differences from
    # them keep their digits where the keys have much in common.
    sigma_0, tau_0, d_sigma, d_tau, cot_do, cot_q, ds_k, p_k = sums
    query, first_key, qd_tile, do_tile, q_tile, lse_row, delta_row = queries
    cot_dk, cot_dv, k, v, batch, kv_head, T = keys
    for back in range(0, end - begin, BLOCK_N):
        start = end - BLOCK_N - back
        k_tile = load(k, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        kd_tile = load(cot_dk, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        v_tile = load(v, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        vd_tile = load(cot_dv, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        own = key == query[:, None]
        p = probabilities(
            *(dot_t(q_tile, k_tile), query[:, None], first_key[:, None], key),
            *(lse_row[:, None], scale, MASKED, BOUNDED),
        )
        p_16 = p.to(k_tile.dtype)
        if SUMS:
            cot_do = add_dot(p_16, vd_tile, cot_do)
        if ROWS and SUMS:
            p_k = add_dot(p_16, k_tile, p_k)
        sd = scores_tangent(q_tile, k_tile, qd_tile, kd_tile, scale)
        if OWN:
            sigma_0 += tl.sum(tl.where(own, sd, 0.0), 1)
        sd -= sigma_0[:, None]
        pd = p * sd
        if ROWS:
            d_sigma += tl.sum(pd, 1)
        if SUMS:
            cot_do = add_dot(pd.to(v_tile.dtype), v_tile, cot_do)
        dp = dot_t(do_tile, v_tile) - delta_row[:, None]
        ds = (p * dp).to(k_tile.dtype)
        if ROWS and SUMS:
            ds_k = add_dot(ds, k_tile, ds_k)
        if SUMS:
            cot_q = add_dot(ds, kd_tile, cot_q)
        dp_dot = dot_t(do_tile, vd_tile)
        if OWN:
            tau_0 += tl.sum(tl.where(own, dp_dot, 0.0), 1)
        x = p * (dp * sd + (dp_dot - tau_0[:, None]))
        if ROWS:
            d_tau += tl.sum(x, 1)
        if SUMS:
            cot_q = add_dot(x.to(k_tile.dtype), k_tile, cot_q)
    return sigma_0, tau_0, d_sigma, d_tau, cot_do, cot_q, ds_k, p_k


@triton.jit(do_not_specialize=["T"])
def attention_double_backward_key_kernel(
    cot_dq,  # [B, H, T, D] in, q's dtype: Q̇
    do,  # [B, H, T, D] in, q's dtype
    q,  # [B, H, T, D] in
    cot_dk,  # [B, K, T, D] in, q's dtype: K̇
    cot_dv,  # [B, K, T, D] in, q's dtype: V̇
    k,  # [B, K, T, D] in, q's dtype
    v,  # [B, K, T, D] in, q's dtype
    cot_k,  # [B, K, T, D] out, q's dtype
    cot_v,  # [B, K, T, D] out, q's dtype
    lse,  # [B, H, T] in, fp32; δ, σ and τ likewise
    delta,
    sigma,
    tau,
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
):
    # cot K = scale (S̄ᵀ Q + dSᵀ Q̇),  cot V = Ṗᵀ dO, summed over the heads of the group;
    # tiles are [keys, queries]
    batch, kv_head, first = key_program(H, G, BLOCK_N)
    begin, full_begin, full_end, end = query_blocks(
        last_query_ptr, batch, first, T, BLOCK_M, BLOCK_N, BOUNDED, SPLIT
    )
    key = first + tl.arange(0, BLOCK_N)[:, None]
    kd_tile = load(cot_dk, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    vd_tile = load(cot_dv, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    k_tile = load(k, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    v_tile = load(v, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    keys = key, kd_tile, vd_tile, k_tile, v_tile
    rows = lse, delta, sigma, tau
    queries = cot_dq, do, q, rows, first_key_ptr, batch, kv_head, G, T
    cot_k_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    cot_v_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sums = cot_k_acc, cot_v_acc
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
    cot_k_acc, cot_v_acc = sums
    store(cot_k, cot_k_acc * scale, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    store(cot_v, cot_v_acc, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)


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
    # cot K / scale and cot V with more queries, of every head of the group
    cot_k, cot_v = sums
    key, kd_tile, vd_tile, k_tile, v_tile = keys
    cot_dq, do, q, rows, first_key_ptr, batch, kv_head, G, T = queries
    lse, delta, sigma, tau = rows
    head = kv_head * G
    start = begin
    for _ in range(0, G * ((end - begin) // BLOCK_M)):
        query = start + tl.arange(0, BLOCK_M)
        first_key = first_keys(first_key_ptr, batch, query, T, BOUNDED)[None, :]
        qd_tile = load(cot_dq, batch, head, start, T, D, BLOCK_M, BLOCK_D)
        do_tile = load(do, batch, head, start, T, D, BLOCK_M, BLOCK_D)
        q_tile = load(q, batch, head, start, T, D, BLOCK_M, BLOCK_D)
        lse_row = load_row(lse, batch, head, start, T, BLOCK_M)[None, :]
        delta_row = load_row(delta, batch, head, start, T, BLOCK_M)[None, :]
        sigma_row = load_row(sigma, batch, head, start, T, BLOCK_M)[None, :]
        tau_row = load_row(tau, batch, head, start, T, BLOCK_M)[None, :]
        s = dot_t(k_tile, q_tile)
        p = probabilities(s, query[None, :], first_key, key, lse_row, scale, MASKED, BOUNDED)
        sd = scores_tangent(k_tile, q_tile, kd_tile, qd_tile, scale) - sigma_row
        cot_v = add_dot((p * sd).to(do_tile.dtype), do_tile, cot_v)
        dp = dot_t(v_tile, do_tile) - delta_row
        cot_k = add_dot((p * dp).to(qd_tile.dtype), qd_tile, cot_k)
        cot_s = p * dot(vd_tile, tl.trans(do_tile), dp * sd - tau_row)
        cot_k = add_dot(cot_s.to(q_tile.dtype), q_tile, cot_k)
        head, start = next_queries(head, start, begin, end, BLOCK_M)
    return cot_k, cot_v
