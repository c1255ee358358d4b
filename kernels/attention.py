"""Causal attention in Triton: the three passes of ops/attention.py, without a [T, T] buffer.

The backward passes make the probabilities P = exp(scale Q Kᵀ − lse) again, tile by tile. A kernel
over query blocks loops over keys, a kernel over key blocks loops over the queries of all heads of
its group, so every output has one writer. Row statistics go between them in fp32. ``visible`` is
the first key that each query sees and the last query that sees each key, int32 [B, T], if that is
not all before or after it.

Shapes: B batch, H heads, K key/value heads, G = H / K, T tokens, D head dim. A tensor [B, H, T, D]
or [B, K, T, D] enters a kernel as its pointer and its strides of batch, head and token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Finite, so that rows that have seen no key yet rescale by exp2(0) and not by exp2(−∞ + ∞).
LOWEST = tl.constexpr(-1e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(x, batch, head, first, T, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    # pointers to x[batch, head, first + i, :], and which of them are inside
    pointer, batch_stride, head_stride, stride = x
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = first + row < T
    if BLOCK_D != D:
        inside = inside & (column < D)
    pointer += batch * batch_stride + head * head_stride + tl.cast(first, tl.int64) * stride
    return pointer + row * stride + column, inside


@triton.jit
def _load(x, batch, head, first, T, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    # x[batch, head, first + i, :], zero outside
    pointers, inside = _tile(x, batch, head, first, T, D, ROWS, BLOCK_D)
    return tl.load(pointers, inside, 0.0)


@triton.jit
def _store(
    x, tile, batch, head, first, T, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    # x[batch, head, first + i, :] = tile[i, :]
    pointers, inside = _tile(x, batch, head, first, T, D, ROWS, BLOCK_D)
    tl.store(pointers, tile.to(pointers.dtype.element_ty), inside)


@triton.jit
def _dot(a, b, acc):
    # acc + a b, fp32
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _dot_t(a, b):
    # a bᵀ, fp32
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _row_dot(a, b):
    # rowsum(a ∘ b), fp32
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def _first_keys(
    first_key_ptr,  # [B, T] in, int32, if BOUNDED
    batch,
    query,
    T,
    BOUNDED: tl.constexpr,
):
    # the first key that each query sees
    if BOUNDED:
        return tl.load(first_key_ptr + batch * T + query, query < T, 0)
    else:
        return tl.zeros_like(query)


@triton.jit
def _first_key_block(
    first_key_ptr, batch, first_query, T, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr
):
    # the first key, rounded down to a block, that a query from first_query on sees
    if BOUNDED:
        return tl.load(first_key_ptr + batch * T + first_query) // BLOCK_N * BLOCK_N
    else:
        return 0


@triton.jit
def _end_query(
    last_query_ptr,  # [B, T] in, int32, if BOUNDED
    batch,
    first_key,
    T,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    # one past the last query that sees a key of this block
    if BOUNDED:
        return tl.load(last_query_ptr + batch * T + tl.minimum(first_key + BLOCK_N, T) - 1) + 1
    else:
        return T


@triton.jit
def _visible(query, first_key, key, BOUNDED: tl.constexpr):
    # whether the queries, a column or a row, see the keys, a row or a column
    visible = key <= query
    if BOUNDED:
        visible = visible & (key >= first_key)
    return visible


@triton.jit
def _scores(a, b, visible, scale):
    # scale log2(e) a bᵀ, −∞ where the query does not see the key; exp2 is cheaper than exp
    return tl.where(visible, _dot_t(a, b) * (scale * LOG2_E), float("-inf"))


@triton.jit
def _probabilities(a, b, visible, lse, scale):
    # exp(scale a bᵀ − lse), zero where the query does not see the key
    return tl.exp2(_scores(a, b, visible, scale) - lse * LOG2_E)


@triton.jit
def _scores_tangent(a, b, ad, bd, scale):
    # scale (ȧ bᵀ + a ḃᵀ)
    return _dot(a, tl.trans(bd), _dot_t(ad, b)) * scale


@triton.jit
def _query_program(H, G, BLOCK_M: tl.constexpr):
    # batch, head, its key/value head, first query; the longest rows start first
    batch = tl.program_id(0).to(tl.int64) // H
    head = tl.program_id(0).to(tl.int64) % H
    return batch, head, head // G, (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M


@triton.jit
def _key_program(H, G, BLOCK_N: tl.constexpr):
    # batch, key/value head, first key
    K = H // G
    batch = tl.program_id(0).to(tl.int64) // K
    return batch, tl.program_id(0).to(tl.int64) % K, tl.program_id(1) * BLOCK_N


@triton.jit(do_not_specialize=["T"])
def _attention_forward_kernel(
    q,  # [B, H, T, D] in
    k,  # [B, K, T, D] in, q's dtype
    v,  # [B, K, T, D] in, q's dtype
    out,  # [B, H, T, D] out, q's dtype
    lse_ptr,  # [B, H, T] out, fp32
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
):
    # O = P V, with P = softmax(scale Q Kᵀ + mask), and lse = log rowsum exp(scale Q Kᵀ + mask)
    batch, head, kv_head, first = _query_program(H, G, BLOCK_M)
    query = first + tl.arange(0, BLOCK_M)
    first_key = _first_keys(first_key_ptr, batch, query, T, BOUNDED)
    begin = _first_key_block(first_key_ptr, batch, first, T, BLOCK_N, BOUNDED)
    q_tile = _load(q, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, first + BLOCK_M, BLOCK_N):
        k_tile = _load(k, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        v_tile = _load(v, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        visible = _visible(query[:, None], first_key[:, None], key, BOUNDED)
        s = _scores(q_tile, k_tile, visible, scale)
        new_top = tl.maximum(top, tl.max(s, 1))
        decay = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * decay + tl.sum(p, 1)
        acc = _dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None])
        top = new_top
    lse = (top + tl.log2(total)) * LN_2
    tl.store(lse_ptr + (batch * H + head) * T + query, lse, query < T)
    _store(out, acc / total[:, None], batch, head, first, T, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["T"])
def _attention_backward_query_kernel(
    do,  # [B, H, T, D] in, q's dtype
    q,  # [B, H, T, D] in
    k,  # [B, K, T, D] in, q's dtype
    v,  # [B, K, T, D] in, q's dtype
    out,  # [B, H, T, D] in, q's dtype
    dq,  # [B, H, T, D] out, q's dtype
    lse_ptr,  # [B, H, T] in, fp32
    delta_ptr,  # [B, H, T] out, fp32
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
):
    # dQ = scale dS K, with dS = P ∘ (dP − δ), dP = dO Vᵀ, δ = rowsum(dO ∘ O)
    batch, head, kv_head, first = _query_program(H, G, BLOCK_M)
    query = first + tl.arange(0, BLOCK_M)
    first_key = _first_keys(first_key_ptr, batch, query, T, BOUNDED)
    begin = _first_key_block(first_key_ptr, batch, first, T, BLOCK_N, BOUNDED)
    row = (batch * H + head) * T + query
    do_tile = _load(do, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    q_tile = _load(q, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    delta = _row_dot(do_tile, _load(out, batch, head, first, T, D, BLOCK_M, BLOCK_D))
    tl.store(delta_ptr + row, delta, query < T)
    lse = tl.load(lse_ptr + row, query < T, 0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, first + BLOCK_M, BLOCK_N):
        k_tile = _load(k, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        v_tile = _load(v, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        visible = _visible(query[:, None], first_key[:, None], key, BOUNDED)
        p = _probabilities(q_tile, k_tile, visible, lse[:, None], scale)
        ds = p * (_dot_t(do_tile, v_tile) - delta[:, None])
        acc = _dot(ds.to(k_tile.dtype), k_tile, acc)
    _store(dq, acc * scale, batch, head, first, T, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["T"])
def _attention_backward_key_kernel(
    do,  # [B, H, T, D] in, q's dtype
    q,  # [B, H, T, D] in
    k,  # [B, K, T, D] in, q's dtype
    v,  # [B, K, T, D] in, q's dtype
    dk,  # [B, K, T, D] out, q's dtype
    dv,  # [B, K, T, D] out, q's dtype
    lse_ptr,  # [B, H, T] in, fp32
    delta_ptr,  # [B, H, T] in, fp32
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
):
    # dK = scale dSᵀ Q,  dV = Pᵀ dO, summed over the heads of the group; tiles are [keys, queries]
    batch, kv_head, first = _key_program(H, G, BLOCK_N)
    key = first + tl.arange(0, BLOCK_N)[:, None]
    k_tile = _load(k, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    v_tile = _load(v, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    begin = first // BLOCK_M * BLOCK_M
    end = _end_query(last_query_ptr, batch, first, T, BLOCK_N, BOUNDED)
    blocks = tl.cdiv(end - begin, BLOCK_M)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(0, G * blocks):
        head = kv_head * G + i // blocks
        start = begin + i % blocks * BLOCK_M
        query = start + tl.arange(0, BLOCK_M)
        first_key = _first_keys(first_key_ptr, batch, query, T, BOUNDED)
        row = (batch * H + head) * T + query
        do_tile = _load(do, batch, head, start, T, D, BLOCK_M, BLOCK_D)
        q_tile = _load(q, batch, head, start, T, D, BLOCK_M, BLOCK_D)
        lse = tl.load(lse_ptr + row, query < T, 0.0)
        delta = tl.load(delta_ptr + row, query < T, 0.0)
        visible = _visible(query[None, :], first_key[None, :], key, BOUNDED)
        p = _probabilities(k_tile, q_tile, visible, lse[None, :], scale)
        dv_acc = _dot(p.to(do_tile.dtype), do_tile, dv_acc)
        ds = p * (_dot_t(v_tile, do_tile) - delta[None, :])
        dk_acc = _dot(ds.to(q_tile.dtype), q_tile, dk_acc)
    _store(dk, dk_acc * scale, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    _store(dv, dv_acc, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["T"])
def _attention_double_backward_query_kernel(
    cot_dq,  # [B, H, T, D] in, q's dtype: Q̇
    cot_dk,  # [B, K, T, D] in, q's dtype: K̇
    cot_dv,  # [B, K, T, D] in, q's dtype: V̇
    do,  # [B, H, T, D] in, q's dtype
    q,  # [B, H, T, D] in
    k,  # [B, K, T, D] in, q's dtype
    v,  # [B, K, T, D] in, q's dtype
    out,  # [B, H, T, D] in, q's dtype
    cot_do,  # [B, H, T, D] out, q's dtype
    cot_q,  # [B, H, T, D] out, q's dtype
    lse_ptr,  # [B, H, T] in, fp32
    delta_ptr,  # [B, H, T] out, fp32; σ and τ likewise
    sigma_ptr,
    tau_ptr,
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
):
    # cot dO = Ṗ V + P V̇,  cot Q = scale (S̄ K + dS K̇), with Ṡ = scale (Q̇ Kᵀ + Q K̇ᵀ),
    # Ṗ = P ∘ (Ṡ − σ),  dS = P ∘ (dP − δ),  S̄ = P ∘ (P̄ − τ),  P̄ = (dP − δ) ∘ (Ṡ − σ) + dO V̇ᵀ,
    # σ = rowsum(P ∘ Ṡ),  τ = rowsum(P ∘ P̄).
    batch, head, kv_head, first = _query_program(H, G, BLOCK_M)
    query = first + tl.arange(0, BLOCK_M)
    first_key = _first_keys(first_key_ptr, batch, query, T, BOUNDED)
    begin = _first_key_block(first_key_ptr, batch, first, T, BLOCK_N, BOUNDED)
    row = (batch * H + head) * T + query
    qd_tile = _load(cot_dq, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    do_tile = _load(do, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    q_tile = _load(q, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    lse = tl.load(lse_ptr + row, query < T, 0.0)
    delta = _row_dot(do_tile, _load(out, batch, head, first, T, D, BLOCK_M, BLOCK_D))

    # Ṡ and dO V̇ᵀ at the query's own key: sums of differences from them keep their digits where
    # the keys have much in common.
    sigma_0 = _row_dot(qd_tile, _load(k, batch, kv_head, first, T, D, BLOCK_M, BLOCK_D))
    sigma_0 += _row_dot(q_tile, _load(cot_dk, batch, kv_head, first, T, D, BLOCK_M, BLOCK_D))
    sigma_0 *= scale
    tau_0 = _row_dot(do_tile, _load(cot_dv, batch, kv_head, first, T, D, BLOCK_M, BLOCK_D))
    sigma = tl.zeros([BLOCK_M], tl.float32)
    tau = tl.zeros([BLOCK_M], tl.float32)
    for start in range(begin, first + BLOCK_M, BLOCK_N):
        k_tile = _load(k, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        kd_tile = _load(cot_dk, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        v_tile = _load(v, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        vd_tile = _load(cot_dv, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        visible = _visible(query[:, None], first_key[:, None], key, BOUNDED)
        p = _probabilities(q_tile, k_tile, visible, lse[:, None], scale)
        sd = _scores_tangent(q_tile, k_tile, qd_tile, kd_tile, scale) - sigma_0[:, None]
        dp = _dot_t(do_tile, v_tile) - delta[:, None]
        sigma += tl.sum(p * sd, 1)
        tau += tl.sum(p * _dot(do_tile, tl.trans(vd_tile), dp * sd - tau_0[:, None]), 1)
    sigma += sigma_0
    tau += tau_0
    tl.store(delta_ptr + row, delta, query < T)
    tl.store(sigma_ptr + row, sigma, query < T)
    tl.store(tau_ptr + row, tau, query < T)

    cot_do_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    cot_q_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, first + BLOCK_M, BLOCK_N):
        k_tile = _load(k, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        kd_tile = _load(cot_dk, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        v_tile = _load(v, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        vd_tile = _load(cot_dv, batch, kv_head, start, T, D, BLOCK_N, BLOCK_D)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        visible = _visible(query[:, None], first_key[:, None], key, BOUNDED)
        p = _probabilities(q_tile, k_tile, visible, lse[:, None], scale)
        cot_do_acc = _dot(p.to(vd_tile.dtype), vd_tile, cot_do_acc)
        sd = _scores_tangent(q_tile, k_tile, qd_tile, kd_tile, scale) - sigma[:, None]
        cot_do_acc = _dot((p * sd).to(v_tile.dtype), v_tile, cot_do_acc)
        dp = _dot_t(do_tile, v_tile) - delta[:, None]
        cot_q_acc = _dot((p * dp).to(kd_tile.dtype), kd_tile, cot_q_acc)
        cot_s = p * _dot(do_tile, tl.trans(vd_tile), dp * sd - tau[:, None])
        cot_q_acc = _dot(cot_s.to(k_tile.dtype), k_tile, cot_q_acc)
    _store(cot_do, cot_do_acc, batch, head, first, T, D, BLOCK_M, BLOCK_D)
    _store(cot_q, cot_q_acc * scale, batch, head, first, T, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["T"])
def _attention_double_backward_key_kernel(
    cot_dq,  # [B, H, T, D] in, q's dtype: Q̇
    cot_dk,  # [B, K, T, D] in, q's dtype: K̇
    cot_dv,  # [B, K, T, D] in, q's dtype: V̇
    do,  # [B, H, T, D] in, q's dtype
    q,  # [B, H, T, D] in
    k,  # [B, K, T, D] in, q's dtype
    v,  # [B, K, T, D] in, q's dtype
    cot_k,  # [B, K, T, D] out, q's dtype
    cot_v,  # [B, K, T, D] out, q's dtype
    lse_ptr,  # [B, H, T] in, fp32; δ, σ and τ likewise
    delta_ptr,
    sigma_ptr,
    tau_ptr,
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
):
    # cot K = scale (S̄ᵀ Q + dSᵀ Q̇),  cot V = Ṗᵀ dO, summed over the heads of the group;
    # tiles are [keys, queries]
    batch, kv_head, first = _key_program(H, G, BLOCK_N)
    key = first + tl.arange(0, BLOCK_N)[:, None]
    kd_tile = _load(cot_dk, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    vd_tile = _load(cot_dv, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    k_tile = _load(k, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    v_tile = _load(v, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    begin = first // BLOCK_M * BLOCK_M
    end = _end_query(last_query_ptr, batch, first, T, BLOCK_N, BOUNDED)
    blocks = tl.cdiv(end - begin, BLOCK_M)
    cot_k_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    cot_v_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(0, G * blocks):
        head = kv_head * G + i // blocks
        start = begin + i % blocks * BLOCK_M
        query = start + tl.arange(0, BLOCK_M)
        first_key = _first_keys(first_key_ptr, batch, query, T, BOUNDED)
        row = (batch * H + head) * T + query
        qd_tile = _load(cot_dq, batch, head, start, T, D, BLOCK_M, BLOCK_D)
        do_tile = _load(do, batch, head, start, T, D, BLOCK_M, BLOCK_D)
        q_tile = _load(q, batch, head, start, T, D, BLOCK_M, BLOCK_D)
        lse = tl.load(lse_ptr + row, query < T, 0.0)
        delta = tl.load(delta_ptr + row, query < T, 0.0)
        sigma = tl.load(sigma_ptr + row, query < T, 0.0)
        tau = tl.load(tau_ptr + row, query < T, 0.0)
        visible = _visible(query[None, :], first_key[None, :], key, BOUNDED)
        p = _probabilities(k_tile, q_tile, visible, lse[None, :], scale)
        sd = _scores_tangent(k_tile, q_tile, kd_tile, qd_tile, scale) - sigma[None, :]
        cot_v_acc = _dot((p * sd).to(do_tile.dtype), do_tile, cot_v_acc)
        dp = _dot_t(v_tile, do_tile) - delta[None, :]
        cot_k_acc = _dot((p * dp).to(qd_tile.dtype), qd_tile, cot_k_acc)
        cot_s = p * _dot(vd_tile, tl.trans(do_tile), dp * sd - tau[None, :])
        cot_k_acc = _dot(cot_s.to(q_tile.dtype), q_tile, cot_k_acc)
    _store(cot_k, cot_k_acc * scale, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)
    _store(cot_v, cot_v_acc, batch, kv_head, first, T, D, BLOCK_N, BLOCK_D)


class Tiles(NamedTuple):
    """How a kernel is cut up: ``queries`` × ``keys`` scores at a time."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# In bf16 and fp16 on sm_90, for head dims up to 64 and up to 128: each warp group of four warps has
# the 64 rows that wgmma wants (queries, or keys in the kernels over key blocks); nothing spills.
TILES = {
    _attention_forward_kernel: (Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 2)),
    _attention_backward_query_kernel: (Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2)),
    _attention_backward_key_kernel: (Tiles(64, 64, 4, 2), Tiles(32, 128, 8, 2)),
    _attention_double_backward_query_kernel: (Tiles(128, 32, 8, 2), Tiles(128, 16, 8, 2)),
    _attention_double_backward_key_kernel: (Tiles(32, 64, 4, 2), Tiles(16, 128, 8, 2)),
}
BY_KEY = (_attention_backward_key_kernel, _attention_double_backward_key_kernel)


def _target(device: torch.device) -> str:
    """The GPU whose tiles fit: sm_80 stands for those without wgmma or tcgen05."""
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":  # Triton's interpreter
        return "sm_90"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def _tiles(kernel: Any, dim: int, dtype: torch.dtype, target: str) -> Tiles:
    if dtype == torch.float32:  # without matrix instructions the operands live in registers
        return Tiles(16, 16, 8, 1)
    if dim > 128:
        return Tiles(32, 16, 8, 1)
    if target == "gfx942":
        return Tiles(32, 32, 4, 1)
    if target == "sm_80":
        return Tiles(64, 32, 4, 2) if dim <= 64 else Tiles(32, 32, 8, 2)
    if target == "sm_100" and kernel is _attention_double_backward_query_kernel:
        return Tiles(128 if dim <= 64 else 64, 32, 8, 2)  # sm_90's overflow its tensor memory
    return TILES[kernel][dim > 64]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """O [B, T, H, D] and lse [B, H, T], the log-sum-exp of each query's scores, in fp32."""
    q, k, v = _rows_dense(q, k, v)
    batch, heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, heads, dim)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    tensors = (q, k, v, out.transpose(1, 2))
    _launch(_attention_forward_kernel, q, k, tensors, (lse,), scale, visible)
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    visible: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV from dO [B, T, H, D]."""
    dout, q, k, v, out = _rows_dense(dout, q, k, v, out)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    rows = lse, torch.empty_like(lse)
    inputs = (dout.transpose(1, 2), q, k, v)
    by_query = (*inputs, out.transpose(1, 2), dq)
    _launch(_attention_backward_query_kernel, q, k, by_query, rows, scale, visible)
    _launch(_attention_backward_key_kernel, q, k, (*inputs, dk, dv), rows, scale, visible)
    return dq, dk, dv


def attention_double_backward(
    cot_dq: Tensor,
    cot_dk: Tensor,
    cot_dv: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    visible: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cotangents of dO, Q, K and V from those of dQ, dK and dV."""
    cot_dq, cot_dk, cot_dv = _rows_dense(cot_dq, cot_dk, cot_dv)
    dout, q, k, v, out = _rows_dense(dout, q, k, v, out)
    cot_dout, cot_q, cot_k, cot_v = (torch.empty_like(t) for t in (dout, q, k, v))
    rows = lse, *(torch.empty_like(lse) for _ in range(3))
    inputs = (cot_dq, cot_dk, cot_dv, dout.transpose(1, 2), q, k, v)
    by_query = (*inputs, out.transpose(1, 2), cot_dout.transpose(1, 2), cot_q)
    _launch(_attention_double_backward_query_kernel, q, k, by_query, rows, scale, visible)
    by_key = (*inputs, cot_k, cot_v)
    _launch(_attention_double_backward_key_kernel, q, k, by_key, rows, scale, visible)
    return cot_dout, cot_q, cot_k, cot_v


def _rows_dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where the last dimension is not contiguous."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _launch(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    tensors: tuple[Tensor, ...],
    rows: tuple[Tensor, ...],
    scale: float,
    visible: tuple[Tensor, Tensor] | None,
) -> None:
    """Runs a kernel on [B, H or K, T, D] tensors and the row statistics [B, H, T]."""
    batch, heads, tokens, dim = q.shape
    tiles = _tiles(kernel, dim, q.dtype, _target(q.device))
    first_key, last_query = visible or (None, None)
    if kernel in BY_KEY:
        grid = (batch * k.shape[1], triton.cdiv(tokens, tiles.keys))
        bounds = (first_key, last_query)
    else:
        grid = (batch * heads, triton.cdiv(tokens, tiles.queries))
        bounds = (first_key,)
    with torch.cuda.device_of(q):
        kernel[grid](
            *((t, *t.stride()[:3]) for t in tensors),
            *rows,
            *bounds,
            heads,
            heads // k.shape[1],
            tokens,
            scale,
            **_constants(tiles, dim, visible is not None),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


def _constants(tiles: Tiles, dim: int, bounded: bool) -> dict[str, Any]:
    return {
        "D": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
        "BOUNDED": bounded,
    }


def compile_cases(target: str) -> list[dict[str, Any]]:
    """Every kernel as it runs in bf16, to compile without a GPU.

    ``target`` is sm_80, sm_90, sm_100 or gfx942, each with its own tiles.

    ``aligned`` names the arguments (of a tuple: every element) that are divisible by 16.
    """
    plain = [(dim, False) for dim in (64, 80, 96, 128)]
    cases = []
    for kernel in TILES:
        for dim, bounded in [*plain, (64, True), (128, True)]:
            tiles = _tiles(kernel, dim, torch.bfloat16, target)
            constants = _constants(tiles, dim, bounded)
            signature: dict[str, Any] = {}
            for name in kernel.arg_names:
                if name in ("first_key_ptr", "last_query_ptr"):
                    signature[name] = "*i32"
                elif name.endswith("_ptr"):
                    signature[name] = "*fp32"
                elif name in ("H", "G", "T", "scale"):
                    signature[name] = "fp32" if name == "scale" else "i32"
                elif name not in constants:
                    signature[name] = ("*bf16", "i32", "i32", "i32")
            extras = ", bounded" if bounded else ""
            cases.append(
                {
                    "name": f"{kernel.fn.__name__.strip('_')} D={dim}{extras}",
                    "kernel": kernel,
                    "signature": signature,
                    "constexprs": constants,
                    "aligned": [n for n in signature if n not in ("H", "G", "T", "scale")],
                    "num_warps": tiles.num_warps,
                    "num_stages": tiles.num_stages,
                }
            )
    return cases
