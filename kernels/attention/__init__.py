"""Causal attention in Triton: the three passes of ops/attention.py, without a [T, T] buffer.

The backward passes make the probabilities P = exp(scale Q Kᵀ − lse) again, tile by tile. A kernel
over query blocks loops over keys, a kernel over key blocks loops over the queries of all heads of
its group, so every output has one writer. Row statistics go between them in fp32.

Products of [queries, keys, head dim] for each pair of blocks: forward 2, backward 7 (5 are the
fewest there can be), double backward 19 (12); what the others are for is said in backward.py and
double_backward.py. Blocks that no query of a program sees are skipped; those that all of them see
are not masked.

Shapes: B batch, H heads, K key/value heads, G = H / K, T tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.attention import Kept, Visible
from ..sizes import cdiv
from .launch import launch_kernel

__all__ = ["attention_backward", "attention_double_backward", "attention_forward"]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Visible
) -> tuple[Tensor, Tensor]:
    """O [B, T, H, D] and lse [B, H, T], the log-sum-exp of each query's scores, in fp32."""
    q, k, v = _rows_dense(q, k, v)
    if scale < 0:  # the kernel takes the largest product for the largest score
        q, scale = -q, -scale
    batch, heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, heads, dim)
    lse = _statistic(q)
    inputs = {"q": q, "k": k, "v": v}
    launch_kernel("forward", inputs, (out.transpose(1, 2),), (lse,), scale, visible)
    return out, lse


def attention_backward(
    dout: Tensor, into: tuple[Tensor, ...] | None, *kept: *Kept
) -> tuple[Tensor, ...]:
    """dQ, dK and dV from dO [B, T, H, D], added to the three ``into`` if given."""
    q, k, v, out, lse, scale, visible = kept
    dout, q, k, v, out = _rows_dense(dout, q, k, v, out)
    dq, dk, dv = into or tuple(map(torch.empty_like, (q, k, v)))
    rows, add = (*_rows_dense(lse), _statistic(q)), into is not None
    inputs = {"do": dout.transpose(1, 2), "q": q, "k": k, "v": v, "out": out.transpose(1, 2)}
    launch_kernel("backward_query", inputs, (dq,), rows, scale, visible, add)
    launch_kernel("backward_key", inputs, (dk, dv), rows, scale, visible, add)
    return dq, dk, dv


def attention_double_backward(
    cot_dq: Tensor, cot_dk: Tensor, cot_dv: Tensor, dout: Tensor, *kept: *Kept
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cotangents of dO, Q, K and V from those of dQ, dK and dV."""
    q, k, v, out, lse, scale, visible = kept
    cot_dq, cot_dk, cot_dv = _rows_dense(cot_dq, cot_dk, cot_dv)
    dout, q, k, v, out = _rows_dense(dout, q, k, v, out)
    cot_dout, cot_q, cot_k, cot_v = (torch.empty_like(t) for t in (dout, q, k, v))
    rows = *_rows_dense(lse), *(_statistic(q) for _ in range(3))
    inputs = {"do": dout.transpose(1, 2), "q": q, "k": k, "v": v, "out": out.transpose(1, 2)}
    inputs |= {"cot_dq": cot_dq, "cot_dk": cot_dk, "cot_dv": cot_dv}
    by_query = cot_dout.transpose(1, 2), cot_q
    launch_kernel("double_backward_query", inputs, by_query, rows, scale, visible)
    launch_kernel("double_backward_key", inputs, (cot_k, cot_v), rows, scale, visible)
    return cot_dout, cot_q, cot_k, cot_v


def _rows_dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where the last dimension is not contiguous."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _statistic(q: Tensor) -> Tensor:
    """An fp32 number for each query, [B, H, T], its rows aligned for the copy engine."""
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, heads, cdiv(tokens, 4) * 4, dtype=torch.float32)[..., :tokens]
