"""Causal attention in Triton: the three passes of ops/attention.py, without a [T, T] buffer.

Each pass recomputes the probabilities P = softmax(scale Q Kᵀ + mask) tile by tile from q, k and v.
A kernel over query blocks loops over keys, a kernel over key blocks loops over the queries of all
heads of its group, so every output has one writer. Row statistics go between them in fp32.

Shapes: B batch, H heads, K key/value heads, G = H / K, T tokens, D head dim.
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


@triton.jit
def _load(
    x_ptr,  # [T, D] in: one head
    first,
    stride,
    T,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # tile[i, :] = x[first + i, :], zero outside
    row = tl.arange(0, BLOCK_T)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = first + row < T
    if BLOCK_D != D:
        mask = mask & (column < D)
    return tl.load(x_ptr + tl.cast(first, tl.int64) * stride + row * stride + column, mask, 0.0)


@triton.jit
def _store(
    x_ptr,  # [T, D] out: one head
    tile,
    first,
    stride,
    T,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # x[first + i, :] = tile[i, :]
    row = tl.arange(0, BLOCK_T)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = first + row < T
    if BLOCK_D != D:
        mask = mask & (column < D)
    pointers = x_ptr + tl.cast(first, tl.int64) * stride + row * stride + column
    tl.store(pointers, tile.to(x_ptr.dtype.element_ty), mask)


@triton.jit
def _load_pairs(
    rows_ptr,  # [T, 2] in, fp32
    row,
    T,
):
    # x[row, 0], x[row, 1]
    pointers = rows_ptr + row[:, None] * 2 + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(pointers, row[:, None] < T, 0.0))


@triton.jit
def _load_quads(
    rows_ptr,  # [T, 4] in, fp32
    row,
    T,
):
    # x[row, 0], …, x[row, 3]
    pointers = rows_ptr + row[:, None] * 4 + tl.arange(0, 4)[None, :]
    x = tl.load(pointers, row[:, None] < T, 0.0)
    even, odd = tl.split(tl.reshape(x, [row.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _dot(a, b, acc):
    # acc + a b, fp32
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _dot_t(a, b):
    # a bᵀ, fp32
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _scores(a, b, scale, query, key, window, WINDOWED: tl.constexpr):
    # scale log2(e) a bᵀ, −∞ where the query does not see the key; exp2 is cheaper than exp
    visible = key <= query
    if WINDOWED:
        visible = visible & (key > query - window)
    return tl.where(visible, _dot_t(a, b) * (scale * LOG2_E), float("-inf"))


@triton.jit
def _first_key(first_query, window, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr):
    # the first key, rounded down to a block, that a query from first_query on sees
    if WINDOWED:
        return tl.maximum(first_query - window + 1, 0) // BLOCK_N * BLOCK_N
    else:
        return 0


@triton.jit
def _last_query(first_key, window, T, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr):
    # one past the last query that sees a key of this block
    if WINDOWED:
        return tl.minimum(T, first_key + BLOCK_N - 1 + window)
    else:
        return T


@triton.jit(do_not_specialize=["T", "window"])
def _attention_forward_kernel(
    q_ptr,  # [B, H, T, D] in
    k_ptr,  # [B, K, T, D] in, q's dtype
    v_ptr,  # [B, K, T, D] in, q's dtype
    out_ptr,  # [B, H, T, D] out, q's dtype
    q_strides,  # of batch, head, token; the others likewise
    k_strides,
    v_strides,
    out_strides,
    H,
    G,
    T,
    window,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    # O = P V, with P = softmax(scale Q Kᵀ + mask)
    batch = tl.program_id(0).to(tl.int64) // H
    head = tl.program_id(0).to(tl.int64) % H
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    k_ptr += batch * k_strides[0] + head // G * k_strides[1]
    v_ptr += batch * v_strides[0] + head // G * v_strides[1]
    out_ptr += batch * out_strides[0] + head * out_strides[1]

    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows start first
    query = first + tl.arange(0, BLOCK_M)[:, None]
    q = _load(q_ptr, first, q_strides[2], T, D, BLOCK_M, BLOCK_D)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(_first_key(first, window, BLOCK_N, WINDOWED), first + BLOCK_M, BLOCK_N):
        k = _load(k_ptr, start, k_strides[2], T, D, BLOCK_N, BLOCK_D)
        v = _load(v_ptr, start, v_strides[2], T, D, BLOCK_N, BLOCK_D)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        s = _scores(q, k, scale, query, key, window, WINDOWED)
        new_top = tl.maximum(top, tl.max(s, 1))
        decay = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * decay + tl.sum(p, 1)
        out = _dot(p.to(v.dtype), v, out * decay[:, None])
        top = new_top
    _store(out_ptr, out / total[:, None], first, out_strides[2], T, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["T", "window"])
def _attention_backward_query_kernel(
    do_ptr,  # [B, H, T, D] in, q's dtype
    q_ptr,  # [B, H, T, D] in
    k_ptr,  # [B, K, T, D] in, q's dtype
    v_ptr,  # [B, K, T, D] in, q's dtype
    dq_ptr,  # [B, H, T, D] out, q's dtype
    rows_ptr,  # [B, H, T, 2] out, fp32: lse in base 2, δ
    do_strides,  # of batch, head, token; the others likewise
    q_strides,
    k_strides,
    v_strides,
    dq_strides,
    H,
    G,
    T,
    window,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    # dQ = scale dS K, with dS = P ∘ (dP − δ), δ = rowsum(P ∘ dP), dP = dO Vᵀ
    batch = tl.program_id(0).to(tl.int64) // H
    head = tl.program_id(0).to(tl.int64) % H
    do_ptr += batch * do_strides[0] + head * do_strides[1]
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    k_ptr += batch * k_strides[0] + head // G * k_strides[1]
    v_ptr += batch * v_strides[0] + head // G * v_strides[1]
    dq_ptr += batch * dq_strides[0] + head * dq_strides[1]
    rows_ptr += (batch * H + head) * 2 * T

    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    do = _load(do_ptr, first, do_strides[2], T, D, BLOCK_M, BLOCK_D)
    q = _load(q_ptr, first, q_strides[2], T, D, BLOCK_M, BLOCK_D)
    begin = _first_key(first, window, BLOCK_N, WINDOWED)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for start in range(begin, first + BLOCK_M, BLOCK_N):
        k = _load(k_ptr, start, k_strides[2], T, D, BLOCK_N, BLOCK_D)
        v = _load(v_ptr, start, v_strides[2], T, D, BLOCK_N, BLOCK_D)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        s = _scores(q, k, scale, row[:, None], key, window, WINDOWED)
        new_top = tl.maximum(top, tl.max(s, 1))
        decay = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * decay + tl.sum(p, 1)
        delta = delta * decay + tl.sum(p * _dot_t(do, v), 1)
        top = new_top
    delta /= total
    lse = top + tl.log2(total)
    tl.store(rows_ptr + 2 * row, lse, row < T)
    tl.store(rows_ptr + 2 * row + 1, delta, row < T)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, first + BLOCK_M, BLOCK_N):
        k = _load(k_ptr, start, k_strides[2], T, D, BLOCK_N, BLOCK_D)
        v = _load(v_ptr, start, v_strides[2], T, D, BLOCK_N, BLOCK_D)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        s = _scores(q, k, scale, row[:, None], key, window, WINDOWED)
        ds = tl.exp2(s - lse[:, None]) * (_dot_t(do, v) - delta[:, None])
        dq = _dot(ds.to(k.dtype), k, dq)
    _store(dq_ptr, dq * scale, first, dq_strides[2], T, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["T", "window"])
def _attention_backward_key_kernel(
    do_ptr,  # [B, H, T, D] in, q's dtype
    q_ptr,  # [B, H, T, D] in
    k_ptr,  # [B, K, T, D] in, q's dtype
    v_ptr,  # [B, K, T, D] in, q's dtype
    dk_ptr,  # [B, K, T, D] out, q's dtype
    dv_ptr,  # [B, K, T, D] out, q's dtype
    rows_ptr,  # [B, H, T, 2] in, fp32: lse in base 2, δ
    do_strides,  # of batch, head, token; the others likewise
    q_strides,
    k_strides,
    v_strides,
    dk_strides,
    dv_strides,
    H,
    G,
    T,
    window,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    # dK = scale dSᵀ Q,  dV = Pᵀ dO, summed over the heads of the group; tiles are [keys, queries]
    K = H // G
    batch = tl.program_id(0).to(tl.int64) // K
    kv_head = tl.program_id(0).to(tl.int64) % K
    k_ptr += batch * k_strides[0] + kv_head * k_strides[1]
    v_ptr += batch * v_strides[0] + kv_head * v_strides[1]
    dk_ptr += batch * dk_strides[0] + kv_head * dk_strides[1]
    dv_ptr += batch * dv_strides[0] + kv_head * dv_strides[1]

    first = tl.program_id(1) * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)[:, None]
    k = _load(k_ptr, first, k_strides[2], T, D, BLOCK_N, BLOCK_D)
    v = _load(v_ptr, first, v_strides[2], T, D, BLOCK_N, BLOCK_D)
    begin = first // BLOCK_M * BLOCK_M
    end = _last_query(first, window, T, BLOCK_N, WINDOWED)
    blocks = tl.cdiv(end - begin, BLOCK_M)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(0, G * blocks):
        head = kv_head * G + i // blocks
        start = begin + i % blocks * BLOCK_M
        do_head = do_ptr + batch * do_strides[0] + head * do_strides[1]
        q_head = q_ptr + batch * q_strides[0] + head * q_strides[1]
        rows_head = rows_ptr + (batch * H + head) * 2 * T
        do = _load(do_head, start, do_strides[2], T, D, BLOCK_M, BLOCK_D)
        q = _load(q_head, start, q_strides[2], T, D, BLOCK_M, BLOCK_D)
        row = start + tl.arange(0, BLOCK_M)
        lse, delta = _load_pairs(rows_head, row, T)
        s = _scores(k, q, scale, row[None, :], key, window, WINDOWED)
        p = tl.exp2(s - lse[None, :])
        dv = _dot(p.to(do.dtype), do, dv)
        ds = p * (_dot_t(v, do) - delta[None, :])
        dk = _dot(ds.to(q.dtype), q, dk)
    _store(dk_ptr, dk * scale, first, dk_strides[2], T, D, BLOCK_N, BLOCK_D)
    _store(dv_ptr, dv, first, dv_strides[2], T, D, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["T", "window"])
def _attention_double_backward_rows_kernel(
    cot_dq_ptr,  # [B, H, T, D] in, q's dtype: Q̇
    cot_dk_ptr,  # [B, K, T, D] in, q's dtype: K̇
    cot_dv_ptr,  # [B, K, T, D] in, q's dtype: V̇
    do_ptr,  # [B, H, T, D] in, q's dtype
    q_ptr,  # [B, H, T, D] in
    k_ptr,  # [B, K, T, D] in, q's dtype
    v_ptr,  # [B, K, T, D] in, q's dtype
    rows_ptr,  # [B, H, T, 4] out, fp32: lse in base 2, δ, σ, τ
    cot_dq_strides,  # of batch, head, token; the others likewise
    cot_dk_strides,
    cot_dv_strides,
    do_strides,
    q_strides,
    k_strides,
    v_strides,
    H,
    G,
    T,
    window,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    # δ = E[dP],  σ = E[Ṡ],  τ = E[(dP − δ) ∘ (Ṡ − σ) + dO V̇ᵀ], with E[X] = rowsum(P ∘ X) and
    # Ṡ = scale (Q̇ Kᵀ + Q K̇ᵀ); the covariance in τ is merged block by block, never as a difference
    batch = tl.program_id(0).to(tl.int64) // H
    head = tl.program_id(0).to(tl.int64) % H
    cot_dq_ptr += batch * cot_dq_strides[0] + head * cot_dq_strides[1]
    cot_dk_ptr += batch * cot_dk_strides[0] + head // G * cot_dk_strides[1]
    cot_dv_ptr += batch * cot_dv_strides[0] + head // G * cot_dv_strides[1]
    do_ptr += batch * do_strides[0] + head * do_strides[1]
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    k_ptr += batch * k_strides[0] + head // G * k_strides[1]
    v_ptr += batch * v_strides[0] + head // G * v_strides[1]
    rows_ptr += (batch * H + head) * 4 * T

    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    qd = _load(cot_dq_ptr, first, cot_dq_strides[2], T, D, BLOCK_M, BLOCK_D)
    do = _load(do_ptr, first, do_strides[2], T, D, BLOCK_M, BLOCK_D)
    q = _load(q_ptr, first, q_strides[2], T, D, BLOCK_M, BLOCK_D)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)  # Σ p
    delta = tl.zeros([BLOCK_M], tl.float32)
    sigma = tl.zeros([BLOCK_M], tl.float32)
    tau = tl.zeros([BLOCK_M], tl.float32)  # Σ p ((dP − δ) (Ṡ − σ) + dO V̇ᵀ)
    for start in range(_first_key(first, window, BLOCK_N, WINDOWED), first + BLOCK_M, BLOCK_N):
        k = _load(k_ptr, start, k_strides[2], T, D, BLOCK_N, BLOCK_D)
        kd = _load(cot_dk_ptr, start, cot_dk_strides[2], T, D, BLOCK_N, BLOCK_D)
        v = _load(v_ptr, start, v_strides[2], T, D, BLOCK_N, BLOCK_D)
        vd = _load(cot_dv_ptr, start, cot_dv_strides[2], T, D, BLOCK_N, BLOCK_D)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        s = _scores(q, k, scale, row[:, None], key, window, WINDOWED)
        new_top = tl.maximum(top, tl.max(s, 1))
        old = total * tl.exp2(top - new_top)
        tau *= tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        new = tl.sum(p, 1)
        share = 1.0 / tl.maximum(new, 1e-30)  # no key of this block may be visible
        dp = _dot_t(do, v)
        sd = _dot(q, tl.trans(kd), _dot_t(qd, k)) * scale
        new_delta = tl.sum(p * dp, 1) * share
        new_sigma = tl.sum(p * sd, 1) * share
        product = (dp - new_delta[:, None]) * (sd - new_sigma[:, None])
        tau += tl.sum(p * _dot(do, tl.trans(vd), product), 1)
        total = old + new
        share = new / tl.maximum(total, 1e-30)
        new_delta -= delta
        new_sigma -= sigma
        tau += new_delta * new_sigma * old * share
        delta += new_delta * share
        sigma += new_sigma * share
        top = new_top
    tl.store(rows_ptr + 4 * row, top + tl.log2(total), row < T)
    tl.store(rows_ptr + 4 * row + 1, delta, row < T)
    tl.store(rows_ptr + 4 * row + 2, sigma, row < T)
    tl.store(rows_ptr + 4 * row + 3, tau / total, row < T)


@triton.jit(do_not_specialize=["T", "window"])
def _attention_double_backward_query_kernel(
    cot_dq_ptr,  # [B, H, T, D] in, q's dtype: Q̇
    cot_dk_ptr,  # [B, K, T, D] in, q's dtype: K̇
    cot_dv_ptr,  # [B, K, T, D] in, q's dtype: V̇
    do_ptr,  # [B, H, T, D] in, q's dtype
    q_ptr,  # [B, H, T, D] in
    k_ptr,  # [B, K, T, D] in, q's dtype
    v_ptr,  # [B, K, T, D] in, q's dtype
    cot_do_ptr,  # [B, H, T, D] out, q's dtype
    cot_q_ptr,  # [B, H, T, D] out, q's dtype
    rows_ptr,  # [B, H, T, 4] in, fp32: lse in base 2, δ, σ, τ
    cot_dq_strides,  # of batch, head, token; the others likewise
    cot_dk_strides,
    cot_dv_strides,
    do_strides,
    q_strides,
    k_strides,
    v_strides,
    cot_do_strides,
    cot_q_strides,
    H,
    G,
    T,
    window,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    # cot dO = Ṗ V + P V̇,  cot Q = scale (S̄ K + dS K̇), with
    # Ṗ = P ∘ (Ṡ − σ),  dS = P ∘ (dP − δ),  S̄ = P ∘ ((dP − δ) ∘ (Ṡ − σ) + dO V̇ᵀ − τ)
    batch = tl.program_id(0).to(tl.int64) // H
    head = tl.program_id(0).to(tl.int64) % H
    cot_dq_ptr += batch * cot_dq_strides[0] + head * cot_dq_strides[1]
    cot_dk_ptr += batch * cot_dk_strides[0] + head // G * cot_dk_strides[1]
    cot_dv_ptr += batch * cot_dv_strides[0] + head // G * cot_dv_strides[1]
    do_ptr += batch * do_strides[0] + head * do_strides[1]
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    k_ptr += batch * k_strides[0] + head // G * k_strides[1]
    v_ptr += batch * v_strides[0] + head // G * v_strides[1]
    rows_ptr += (batch * H + head) * 4 * T
    cot_do_ptr += batch * cot_do_strides[0] + head * cot_do_strides[1]
    cot_q_ptr += batch * cot_q_strides[0] + head * cot_q_strides[1]

    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    qd = _load(cot_dq_ptr, first, cot_dq_strides[2], T, D, BLOCK_M, BLOCK_D)
    do = _load(do_ptr, first, do_strides[2], T, D, BLOCK_M, BLOCK_D)
    q = _load(q_ptr, first, q_strides[2], T, D, BLOCK_M, BLOCK_D)
    lse, delta, sigma, tau = _load_quads(rows_ptr, row, T)
    cot_do = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    cot_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(_first_key(first, window, BLOCK_N, WINDOWED), first + BLOCK_M, BLOCK_N):
        k = _load(k_ptr, start, k_strides[2], T, D, BLOCK_N, BLOCK_D)
        kd = _load(cot_dk_ptr, start, cot_dk_strides[2], T, D, BLOCK_N, BLOCK_D)
        v = _load(v_ptr, start, v_strides[2], T, D, BLOCK_N, BLOCK_D)
        vd = _load(cot_dv_ptr, start, cot_dv_strides[2], T, D, BLOCK_N, BLOCK_D)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        s = _scores(q, k, scale, row[:, None], key, window, WINDOWED)
        p = tl.exp2(s - lse[:, None])
        cot_do = _dot(p.to(vd.dtype), vd, cot_do)
        sd = _dot(q, tl.trans(kd), _dot_t(qd, k)) * scale - sigma[:, None]
        cot_do = _dot((p * sd).to(v.dtype), v, cot_do)
        dp = _dot_t(do, v) - delta[:, None]
        cot_q = _dot((p * dp).to(kd.dtype), kd, cot_q)
        cot_s = p * _dot(do, tl.trans(vd), dp * sd - tau[:, None])
        cot_q = _dot(cot_s.to(k.dtype), k, cot_q)
    _store(cot_do_ptr, cot_do, first, cot_do_strides[2], T, D, BLOCK_M, BLOCK_D)
    _store(cot_q_ptr, cot_q * scale, first, cot_q_strides[2], T, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["T", "window"])
def _attention_double_backward_key_kernel(
    cot_dq_ptr,  # [B, H, T, D] in, q's dtype: Q̇
    cot_dk_ptr,  # [B, K, T, D] in, q's dtype: K̇
    cot_dv_ptr,  # [B, K, T, D] in, q's dtype: V̇
    do_ptr,  # [B, H, T, D] in, q's dtype
    q_ptr,  # [B, H, T, D] in
    k_ptr,  # [B, K, T, D] in, q's dtype
    v_ptr,  # [B, K, T, D] in, q's dtype
    cot_k_ptr,  # [B, K, T, D] out, q's dtype
    cot_v_ptr,  # [B, K, T, D] out, q's dtype
    rows_ptr,  # [B, H, T, 4] in, fp32: lse in base 2, δ, σ, τ
    cot_dq_strides,  # of batch, head, token; the others likewise
    cot_dk_strides,
    cot_dv_strides,
    do_strides,
    q_strides,
    k_strides,
    v_strides,
    cot_k_strides,
    cot_v_strides,
    H,
    G,
    T,
    window,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    # cot K = scale (S̄ᵀ Q + dSᵀ Q̇),  cot V = Ṗᵀ dO, summed over the heads of the group;
    # tiles are [keys, queries]
    K = H // G
    batch = tl.program_id(0).to(tl.int64) // K
    kv_head = tl.program_id(0).to(tl.int64) % K
    cot_dk_ptr += batch * cot_dk_strides[0] + kv_head * cot_dk_strides[1]
    cot_dv_ptr += batch * cot_dv_strides[0] + kv_head * cot_dv_strides[1]
    k_ptr += batch * k_strides[0] + kv_head * k_strides[1]
    v_ptr += batch * v_strides[0] + kv_head * v_strides[1]
    cot_k_ptr += batch * cot_k_strides[0] + kv_head * cot_k_strides[1]
    cot_v_ptr += batch * cot_v_strides[0] + kv_head * cot_v_strides[1]

    first = tl.program_id(1) * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)[:, None]
    kd = _load(cot_dk_ptr, first, cot_dk_strides[2], T, D, BLOCK_N, BLOCK_D)
    vd = _load(cot_dv_ptr, first, cot_dv_strides[2], T, D, BLOCK_N, BLOCK_D)
    k = _load(k_ptr, first, k_strides[2], T, D, BLOCK_N, BLOCK_D)
    v = _load(v_ptr, first, v_strides[2], T, D, BLOCK_N, BLOCK_D)
    begin = first // BLOCK_M * BLOCK_M
    end = _last_query(first, window, T, BLOCK_N, WINDOWED)
    blocks = tl.cdiv(end - begin, BLOCK_M)
    cot_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    cot_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(0, G * blocks):
        head = kv_head * G + i // blocks
        start = begin + i % blocks * BLOCK_M
        cot_dq_head = cot_dq_ptr + batch * cot_dq_strides[0] + head * cot_dq_strides[1]
        do_head = do_ptr + batch * do_strides[0] + head * do_strides[1]
        q_head = q_ptr + batch * q_strides[0] + head * q_strides[1]
        rows_head = rows_ptr + (batch * H + head) * 4 * T
        qd = _load(cot_dq_head, start, cot_dq_strides[2], T, D, BLOCK_M, BLOCK_D)
        do = _load(do_head, start, do_strides[2], T, D, BLOCK_M, BLOCK_D)
        q = _load(q_head, start, q_strides[2], T, D, BLOCK_M, BLOCK_D)
        row = start + tl.arange(0, BLOCK_M)
        lse, delta, sigma, tau = _load_quads(rows_head, row, T)
        s = _scores(k, q, scale, row[None, :], key, window, WINDOWED)
        p = tl.exp2(s - lse[None, :])
        sd = _dot(kd, tl.trans(q), _dot_t(k, qd)) * scale - sigma[None, :]
        cot_v = _dot((p * sd).to(do.dtype), do, cot_v)
        dp = _dot_t(v, do) - delta[None, :]
        cot_k = _dot((p * dp).to(qd.dtype), qd, cot_k)
        cot_s = p * _dot(vd, tl.trans(do), dp * sd - tau[None, :])
        cot_k = _dot(cot_s.to(q.dtype), q, cot_k)
    _store(cot_k_ptr, cot_k * scale, first, cot_k_strides[2], T, D, BLOCK_N, BLOCK_D)
    _store(cot_v_ptr, cot_v, first, cot_v_strides[2], T, D, BLOCK_N, BLOCK_D)


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
    _attention_double_backward_rows_kernel: (Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 2)),
    _attention_double_backward_query_kernel: (Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 2)),
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
    if target == "sm_100" and kernel is _attention_double_backward_query_kernel and dim > 64:
        return Tiles(64, 32, 8, 2)  # the accumulators of 128 queries overflow its tensor memory
    return TILES[kernel][dim > 64]


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """O [B, T, H, D]."""
    batch, heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, heads, dim)
    tensors = (*_rows_dense(q, k, v), out.transpose(1, 2))
    _launch(_attention_forward_kernel, q, k, tensors, scale, window)
    return out


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV from dO [B, T, H, D]."""
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    rows = q.new_empty(*q.shape[:3], 2, dtype=torch.float32)
    inputs = _rows_dense(dout.transpose(1, 2), q, k, v)
    _launch(_attention_backward_query_kernel, q, k, (*inputs, dq), scale, window, rows)
    _launch(_attention_backward_key_kernel, q, k, (*inputs, dk, dv), scale, window, rows)
    return dq, dk, dv


def attention_double_backward(
    cot_dq: Tensor,
    cot_dk: Tensor,
    cot_dv: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cotangents of dO, Q, K and V from those of dQ, dK and dV."""
    cot_do, cot_q, cot_k, cot_v = (torch.empty_like(t) for t in (dout, q, k, v))
    rows = q.new_empty(*q.shape[:3], 4, dtype=torch.float32)
    inputs = _rows_dense(cot_dq, cot_dk, cot_dv, dout.transpose(1, 2), q, k, v)
    by_query, by_key = (cot_do.transpose(1, 2), cot_q), (cot_k, cot_v)
    _launch(_attention_double_backward_rows_kernel, q, k, inputs, scale, window, rows)
    _launch(
        _attention_double_backward_query_kernel, q, k, (*inputs, *by_query), scale, window, rows
    )
    _launch(_attention_double_backward_key_kernel, q, k, (*inputs, *by_key), scale, window, rows)
    return cot_do, cot_q, cot_k, cot_v


def _rows_dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where the last dimension is not contiguous."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _launch(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    tensors: tuple[Tensor, ...],
    scale: float,
    window: int | None,
    *rows: Tensor,
) -> None:
    """Runs a kernel on [B, H or K, T, D] tensors and the row statistics."""
    batch, heads, tokens, dim = q.shape
    tiles = _tiles(kernel, dim, q.dtype, _target(q.device))
    windowed = window is not None and window < tokens
    if kernel in BY_KEY:
        grid = (batch * k.shape[1], triton.cdiv(tokens, tiles.keys))
    else:
        grid = (batch * heads, triton.cdiv(tokens, tiles.queries))
    with torch.cuda.device_of(q):
        kernel[grid](
            *tensors,
            *rows,
            *(t.stride()[:3] for t in tensors),
            heads,
            heads // k.shape[1],
            tokens,
            window if windowed else 0,
            scale,
            **_constants(tiles, dim, windowed),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


def _constants(tiles: Tiles, dim: int, windowed: bool) -> dict[str, Any]:
    return {
        "D": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
        "WINDOWED": windowed,
    }


def compile_cases(target: str) -> list[dict[str, Any]]:
    """Every kernel as it runs in bf16 at head dims 64 and 128, to compile without a GPU.

    ``target`` is sm_80, sm_90, sm_100 or gfx942, each with its own tiles.

    ``aligned`` names the arguments (of a tuple: every element) that are divisible by 16.
    """
    cases = []
    for kernel in TILES:
        for dim in (64, 128):
            tiles = _tiles(kernel, dim, torch.bfloat16, target)
            constants = _constants(tiles, dim, windowed=False)
            signature: dict[str, Any] = {}
            for name in kernel.arg_names:
                if name.endswith("_strides"):
                    signature[name] = ("i32", "i32", "i32")
                elif name.endswith("_ptr"):
                    signature[name] = "*fp32" if name == "rows_ptr" else "*bf16"
                elif name not in constants:
                    signature[name] = "fp32" if name == "scale" else "i32"
            cases.append(
                {
                    "name": f"{kernel.fn.__name__.strip('_')} D={dim}",
                    "kernel": kernel,
                    "signature": signature,
                    "constexprs": constants,
                    "aligned": [n for n in signature if n.endswith(("_ptr", "_strides"))],
                    "num_warps": tiles.num_warps,
                    "num_stages": tiles.num_stages,
                }
            )
    return cases
