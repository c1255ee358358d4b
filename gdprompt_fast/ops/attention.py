"""Causal attention with a double backward and no [T, T] buffer in or between its passes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .backend import implementation
from .guard import forbid_higher_order
from .left import Left

# The first key that each query sees and the last query that sees each key, int32 [B, T]; None where
# that is all before or after it.
Visible = tuple[Tensor, Tensor] | None
# q, k, v, O [B, T, H, D], the log-sum-exp of each query's scores, [B, H, T] in fp32 or fp64, the
# scale and the keys visible: what a forward leaves for the backward passes of each backend.
Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, Visible]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    segment_BT: Tensor | None = None,
) -> Tensor:
    """O = softmax(scale · Q Kᵀ + mask) V, twice differentiable.

    PyTorch's fused attention has no double backward (pytorch issue 116350). The backward passes
    make the probabilities again, tile by tile, from q, k and the log-sum-exp of each query's
    scores. Kept for them: q, k, v, the log-sum-exp, and O, which the next layer keeps anyway.

    Args:
        q: [B, H, T, D].
        k, v: [B, K, T, D], K key/value heads; K divides H (grouped-query attention).
        window: a query sees this many positions, itself the last; None for all before it.
        segment_BT: integers; a segment is a run of equal ones, and a query sees keys of its own
            segment only. For texts packed into a row, and for padding, a segment of its own whose
            values do not matter as long as no product of them overflows. None for one segment.

    Returns:
        [B, T, H, D], contiguous, as transformers' attention functions return it.
    """
    out, _ = _Attention.apply(q, k, v, scale, visible_keys(q, window, segment_BT))
    return out


def visible_keys(q: Tensor, window: int | None = None, segment_BT: Tensor | None = None) -> Visible:
    """Which keys the queries see: each from its first one to itself."""
    batch, _, tokens, _ = q.shape
    if segment_BT is None and (window is None or window >= tokens):
        return None
    position = torch.arange(tokens, device=q.device)
    first, last = torch.zeros_like(position), torch.full_like(position, tokens - 1)
    if segment_BT is not None:
        begins = F.pad(segment_BT[:, 1:] != segment_BT[:, :-1], (1, 0), value=True)
        ends = begins.roll(-1, dims=1)
        first = torch.where(begins, position, first).cummax(1).values
        last = torch.where(ends, position, last).flip(1).cummin(1).values.flip(1)
    if window is not None:
        first = torch.maximum(first, position - window + 1)
        last = torch.minimum(last, position + window - 1)
    return first.expand(batch, -1).int().contiguous(), last.expand(batch, -1).int().contiguous()


class _Attention(Function):
    # The second output is an anchor (ops/left.py): the double backward runs before the last
    # backward, which adds to the cotangents of q, k and v that it leaves.
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Visible
    ) -> tuple[Tensor, Tensor]:
        ctx.options = scale, visible
        anchor, ctx.left = q.new_empty(0), Left()
        out, lse = implementation("attention", q).attention_forward(q, k, v, *ctx.options)
        ctx.save_for_backward(anchor, q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, anchor

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> Any:
        anchor, *tensors = ctx.saved_tensors
        if dout is None:
            return *(ctx.left.take() or (None, None, None)), None, None
        # Detached: how they and O depend on each other is part of the double backward.
        kept = *(each.detach() for each in tensors), *ctx.options
        if torch.is_grad_enabled():
            gradients = _AttentionBackward.apply(dout, anchor, ctx.left, *kept)
        else:
            passes = implementation("attention", dout)
            gradients = passes.attention_backward(dout, ctx.left.take(), *kept)
        return *gradients, None, None


class _AttentionBackward(Function):
    # P = exp(scale Q Kᵀ − lse);  dP = dO Vᵀ;  δ = rowsum(dO ∘ O);  dS = P ∘ (dP − δ)
    # dQ = scale dS K;  dK = scale dSᵀ Q;  dV = Pᵀ dO
    @staticmethod
    def forward(
        ctx: Any, dout: Tensor, anchor: Tensor, left: Left, *kept: *Kept
    ) -> tuple[Tensor, ...]:
        *tensors, scale, visible = kept
        ctx.save_for_backward(dout, *tensors)
        ctx.options, ctx.left = (scale, visible), left
        return implementation("attention", dout).attention_backward(dout, None, *kept)

    @staticmethod
    def backward(ctx: Any, cot_dq: Tensor, cot_dk: Tensor, cot_dv: Tensor) -> Any:
        # Cotangents Q̇ of dQ, K̇ of dK, V̇ of dV:
        #   Ṡ = scale (Q̇ Kᵀ + Q K̇ᵀ);  σ = rowsum(P ∘ Ṡ);  Ṗ = P ∘ (Ṡ − σ)
        #   P̄ = (dP − δ) ∘ (Ṡ − σ) + dO V̇ᵀ;  S̄ = P ∘ (P̄ − τ);  τ = rowsum(P ∘ P̄)
        #   cot dO = Ṗ V + P V̇;  cot V = Ṗᵀ dO
        #   cot Q = scale (S̄ K + dS K̇);  cot K = scale (S̄ᵀ Q + dSᵀ Q̇)
        forbid_higher_order("attention", "twice")
        cot_dout, *cotangents = implementation("attention", cot_dq).attention_double_backward(
            cot_dq, cot_dk, cot_dv, *ctx.saved_tensors, *ctx.options
        )
        ctx.left.put(*cotangents)
        return cot_dout, *(None for _ in range(9))
