"""Causal attention: the three passes of ops/attention.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Kept, Visible

_ops = torch.ops.gdprompt_fast


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Visible
) -> tuple[Tensor, Tensor]:
    """O [B, T, H, D] and lse."""
    out = _empty_heads_last(q).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    first_key = _first_key(q, visible)
    _ops.attention_forward(*rows(q, k, v), scale, first_key, out.transpose(1, 2), lse)
    return out, lse


def attention_backward(
    dout: Tensor, into: tuple[Tensor, ...] | None, *kept: *Kept
) -> tuple[Tensor, ...]:
    """dQ, dK and dV from dO [B, T, H, D], added to the three ``into`` if given."""
    q, k, v, _, lse, scale, visible = kept
    inputs = rows(dout.transpose(1, 2), q, k, v)
    dq, dk, dv = _empty_heads_last(q), _empty_heads_last(k), _empty_heads_last(v)
    _ops.attention_backward(*inputs, lse, scale, _first_key(q, visible), dq, dk, dv)
    new = dq, dk, dv
    return new if into is None else tuple(t.add_(n) for t, n in zip(into, new, strict=True))


def attention_double_backward(
    cot_dq: Tensor, cot_dk: Tensor, cot_dv: Tensor, dout: Tensor, *kept: *Kept
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cotangents of dO, Q, K and V from those of dQ, dK and dV."""
    q, k, v, _, lse, scale, visible = kept
    dots = rows(cot_dq, cot_dk, cot_dv)
    inputs = rows(dout.transpose(1, 2), q, k, v)
    cot_dout = torch.empty_like(dout, memory_format=torch.contiguous_format)
    cot_q, cot_k, cot_v = _empty_heads_last(q), _empty_heads_last(k), _empty_heads_last(v)
    results = cot_dout.transpose(1, 2), cot_q, cot_k, cot_v
    _ops.attention_double_backward(*dots, *inputs, lse, scale, _first_key(q, visible), *results)
    return cot_dout, cot_q, cot_k, cot_v


def rows(*tensors: Tensor) -> list[Tensor]:
    """The same with the last dimension contiguous."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _first_key(q: Tensor, visible: Visible) -> Tensor:
    """[B, T] int32: a query sees the keys from there to itself."""
    if visible is not None:
        return visible[0]
    return torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32)


def _empty_heads_last(like: Tensor) -> Tensor:
    """[B, H, T, D] that is [B, T, H, D] in memory, as the projections want it."""
    batch, heads, tokens, dim = like.shape
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)
