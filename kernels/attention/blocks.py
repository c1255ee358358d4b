"""What the attention kernels share: places in the grid, ranges of blocks, tiles, scores.

A tensor x of [B, H, T, D], [B, K, T, D] or [B, H, T] (a statistic of each query) enters a kernel as
a tuple of its pointer and its strides of batch, head and, where it has a head dim, token, or as a
tensor descriptor, which the GPU's copy engine reads by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def query_program(H, G, BLOCK_M: tl.constexpr):
    # batch, head, its key/value head, first query; the longest rows start first
    batch = tl.program_id(0).to(tl.int64) // H
    head = tl.program_id(0).to(tl.int64) % H
    return batch, head, head // G, (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M


@triton.jit
def key_program(H, G, BLOCK_N: tl.constexpr):
    # batch, key/value head, first key; the keys that most queries see start first
    K = H // G
    batch = tl.program_id(0).to(tl.int64) // K
    return batch, tl.program_id(0).to(tl.int64) % K, tl.program_id(1) * BLOCK_N


@triton.jit
def key_blocks(
    first_key_ptr,  # [B, T] in, int32, if BOUNDED
    batch,
    first,
    T,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # The keys that BLOCK_M queries from ``first`` on see are begin .. end, all of them see
    # full_begin .. full_end: whole blocks, empty without SPLIT.
    end = tl.cdiv(tl.minimum(first + BLOCK_M, T), BLOCK_N) * BLOCK_N
    begin = 0
    if BOUNDED:
        begin = tl.load(first_key_ptr + batch * T + first) // BLOCK_N * BLOCK_N
    full_begin = begin
    full_end = begin
    if SPLIT:
        full_end = first // BLOCK_N * BLOCK_N
        if BOUNDED:
            last = tl.load(first_key_ptr + batch * T + tl.minimum(first + BLOCK_M, T) - 1)
            full_end = tl.maximum(full_end, begin)
            full_begin = tl.minimum(tl.cdiv(last, BLOCK_N) * BLOCK_N, full_end)
    return begin, full_begin, full_end, end


@triton.jit
def query_blocks(
    last_query_ptr,  # [B, T] in, int32, if BOUNDED
    batch,
    first,
    T,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # The queries that see BLOCK_N keys from ``first`` on are begin .. end, full_begin .. full_end
    # see all of them: whole blocks, empty without SPLIT.
    begin = first // BLOCK_M * BLOCK_M
    last = T
    if BOUNDED:
        last = tl.load(last_query_ptr + batch * T + tl.minimum(first + BLOCK_N, T) - 1) + 1
    end = tl.cdiv(last, BLOCK_M) * BLOCK_M
    full_begin = end
    full_end = end
    if SPLIT:
        full_begin = tl.minimum(tl.cdiv(first + BLOCK_N - 1, BLOCK_M) * BLOCK_M, end)
        if BOUNDED:
            last = tl.load(last_query_ptr + batch * T + first) + 1
            full_end = tl.maximum(last // BLOCK_M * BLOCK_M, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def first_keys(first_key_ptr, batch, query, T, BOUNDED: tl.constexpr):
    # the first key that each query sees, [B, T] int32 if BOUNDED
    if BOUNDED:
        return tl.load(first_key_ptr + batch * T + query, query < T, 0)
    else:
        return tl.zeros_like(query)


@triton.jit
def load_row(x, batch, head, first, T, ROWS: tl.constexpr):
    # x[batch, head, first + i], zero outside
    if isinstance(x, tl.tensor_descriptor):
        place = [tl.cast(batch, tl.int32), tl.cast(head, tl.int32), tl.cast(first, tl.int32)]
        return x.load(place).reshape(ROWS)
    else:
        pointers, inside = _row(x, batch, head, first, T, ROWS)
        return tl.load(pointers, inside, 0.0)


@triton.jit
def store_row(x, values, batch, head, first, T, ROWS: tl.constexpr):
    # x[batch, head, first + i] = values[i]
    pointers, inside = _row(x, batch, head, first, T, ROWS)
    tl.store(pointers, values, inside)


@triton.jit
def _row(x, batch, head, first, T, ROWS: tl.constexpr):
    # pointers to x[batch, head, first + i], and which of them are inside
    pointer, batch_stride, head_stride = x
    row = first + tl.arange(0, ROWS)
    return pointer + batch * batch_stride + head * head_stride + row, row < T


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
def load(x, batch, head, first, T, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    # x[batch, head, first + i, :], zero outside
    if isinstance(x, tl.tensor_descriptor):
        place = [tl.cast(batch, tl.int32), tl.cast(head, tl.int32), tl.cast(first, tl.int32), 0]
        return x.load(place).reshape(ROWS, BLOCK_D)
    else:
        pointers, inside = _tile(x, batch, head, first, T, D, ROWS, BLOCK_D)
        return tl.load(pointers, inside, 0.0)


@triton.jit
def store(
    x,
    tile,
    batch,
    head,
    first,
    T,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADD: tl.constexpr = False,
):
    # x[batch, head, first + i, :] = tile[i, :], or += if ADD
    pointers, inside = _tile(x, batch, head, first, T, D, ROWS, BLOCK_D)
    if ADD:
        tile += tl.load(pointers, inside, 0.0).to(tl.float32)
    tl.store(pointers, tile.to(pointers.dtype.element_ty), inside)


@triton.jit
def dot(a, b, acc):
    # acc + a b, fp32
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def add_dot(a, b, acc):
    # acc + a b, fp32, for sums over a text. Without matrix instructions tl.dot adds its products to
    # acc one by one, each time with a rounding of the whole sum; so in fp32 a block is summed by
    # itself first. The limit on imprecise sums keeps the compiler from folding the two into one.
    if a.dtype == tl.float32:
        return acc + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=a.shape[1])
    else:
        return dot(a, b, acc)


@triton.jit
def dot_t(a, b):
    # a bᵀ, fp32
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def row_dot(a, b):
    # rowsum(a ∘ b), fp32
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def visible(query, first_key, key, BOUNDED: tl.constexpr):
    # whether the queries, a column or a row, see the keys, a row or a column
    seen = key <= query
    if BOUNDED:
        seen = seen & (key >= first_key)
    return seen


@triton.jit
def probabilities(
    products, query, first_key, key, lse, scale, MASKED: tl.constexpr, BOUNDED: tl.constexpr
):
    # exp(scale Q Kᵀ − lse), zero where the query does not see the key; exp2 is cheaper than exp
    bits = products * (scale * LOG2_E) - lse * LOG2_E
    if MASKED:
        bits = tl.where(visible(query, first_key, key, BOUNDED), bits, float("-inf"))
    return tl.exp2(bits)


@triton.jit
def scores_tangent(a, b, ad, bd, scale):
    # scale (ȧ bᵀ + a ḃᵀ)
    return dot(a, tl.trans(bd), dot_t(ad, b)) * scale


@triton.jit
def next_queries(head, start, begin, end, BLOCK_M: tl.constexpr):
    # the block of queries after this one: of the same head, or the first of the next head
    start += BLOCK_M
    over = start >= end
    return head + over.to(tl.int64), tl.where(over, begin, start)
