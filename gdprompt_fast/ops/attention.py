"""Causal attention with a double backward and no [T, T] buffer between passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .guard import differentiable_no_further

# Scores of this many elements are alive at once; queries are taken a block at a time to stay below
# it.
TILE_ELEMENTS = 1 << 21


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """O = softmax(scale · Q Kᵀ + causal mask) V, twice differentiable.

    PyTorch's fused attention has no double backward (pytorch issue 116350). Every pass here
    recomputes the probabilities from q, k and v, a block of queries at a time.

    Args:
        q: [B, H, T, D].
        k, v: [B, K, T, D], K key/value heads; K divides H (grouped-query attention).
        window: a query sees this many positions, itself the last; None for all before it.

    Returns:
        [B, T, H, D], contiguous, as transformers' attention functions return it.
    """
    return _Attention.apply(q, k, v, scale, window)


class _Block:
    """A block of queries with the keys it may see; every tensor with the G queries of a key head
    side by side.
    """

    def __init__(
        self, q: Tensor, k: Tensor, start: int, stop: int, scale: float, window: int | None
    ) -> None:
        self.first_key = 0 if window is None else max(0, start - window + 1)
        self.queries, self.keys = slice(start, stop), slice(self.first_key, stop)
        self.scale, self.heads, self.size = scale, k.shape[1], stop - start
        position = torch.arange(start, stop, device=q.device)[:, None]
        key = torch.arange(self.first_key, stop, device=q.device)
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        self.q, self.k = self.rows(q), self.cols(k)
        scores = self.scores(self.q, self.k)
        self.tile(scores).masked_fill_(hidden, float("-inf"))
        self.p = torch.softmax(scores, dim=-1)  # [B, K, G·b, S]

    def rows(self, t: Tensor) -> Tensor:
        """Queries of this block: [B, H, T, D] → [B, K, G·b, D]."""
        t = t[:, :, self.queries]
        return t.reshape(t.shape[0], self.heads, -1, t.shape[-1])

    def cols(self, t: Tensor) -> Tensor:
        """Keys of this block: [B, K, T, D] → [B, K, S, D]."""
        return t[:, :, self.keys]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).mul_(self.scale)

    def tile(self, s: Tensor) -> Tensor:
        """[B, K, G·b, S] → [B, K, G, b, S]."""
        return s.view(*s.shape[:2], -1, self.size, s.shape[-1])

    def add_rows(self, out: Tensor, t: Tensor) -> None:
        """Adds [B, K, G·b, D] to this block's queries of ``out`` [B, H, T, D]."""
        out[:, :, self.queries] += t.view(out.shape[0], out.shape[1], self.size, out.shape[-1])

    def add_cols(self, out: Tensor, t: Tensor) -> None:
        out[:, :, self.keys] += t


def _blocks(q: Tensor, k: Tensor, scale: float, window: int | None) -> Iterator[_Block]:
    batch, heads, tokens, _ = q.shape
    size = max(1, min(tokens, TILE_ELEMENTS // (batch * heads * tokens)))
    for start in range(0, tokens, size):
        yield _Block(q, k, start, min(start + size, tokens), scale, window)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = scale, window
        batch, heads, tokens, dim = q.shape
        out = q.new_zeros(batch, tokens, heads, dim)
        for block in _blocks(q, k, scale, window):
            block.add_rows(out.transpose(1, 2), block.p @ block.cols(v))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        dq, dk, dv = _AttentionBackward.apply(dout, *ctx.saved_tensors, *ctx.options)
        return dq, dk, dv, None, None


class _AttentionBackward(Function):
    # dP = dO Vᵀ;  δ = rowsum(P ∘ dP);  dS = P ∘ (dP − δ);  dQ = s dS K;  dK = s dSᵀ Q;  dV = Pᵀ dO
    @staticmethod
    def forward(
        ctx: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(dout, q, k, v)
        ctx.options = scale, window
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in _blocks(q, k, scale, window):
            do = block.rows(dout.transpose(1, 2))
            dp = do @ block.cols(v).transpose(-1, -2)
            delta = (block.p * dp).sum(-1, keepdim=True)
            ds = dp.sub_(delta).mul_(block.p).mul_(scale)
            block.add_rows(dq, ds @ block.k)
            block.add_cols(dk, ds.transpose(-1, -2) @ block.q)
            block.add_cols(dv, block.p.transpose(-1, -2) @ do)
        return dq, dk, dv

    @staticmethod
    def backward(ctx: Any, cot_dq: Tensor, cot_dk: Tensor, cot_dv: Tensor) -> Any:
        # Cotangents Q̇ of dQ, K̇ of dK, V̇ of dV. Ṡ = s (Q̇ Kᵀ + Q K̇ᵀ);  σ = rowsum(P ∘ Ṡ);  Ṗ = P
        # ∘ (Ṡ − σ)
        #   P̄ = (dP − δ) ∘ Ṡ − σ dP + dO V̇ᵀ;  S̄ = P ∘ (P̄ − rowsum(P ∘ P̄))
        #   cot dO = Ṗ V + P V̇;  cot V = Ṗᵀ dO;  cot Q = s (S̄ K + dS K̇);  cot K = s (S̄ᵀ Q + dSᵀ
        # Q̇)
        differentiable_no_further("attention", "twice")
        dout, q, k, v = ctx.saved_tensors
        scale, window = ctx.options
        cot_dout = torch.zeros_like(dout)
        cot_q, cot_k, cot_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in _blocks(q, k, scale, window):
            do, qd = block.rows(dout.transpose(1, 2)), block.rows(cot_dq)
            kd, vd, vb, p = block.cols(cot_dk), block.cols(cot_dv), block.cols(v), block.p
            dp = do @ vb.transpose(-1, -2)
            centred = dp - (p * dp).sum(-1, keepdim=True)
            sdot = block.scores(qd, block.k).add_(block.scores(block.q, kd))
            sigma = (p * sdot).sum(-1, keepdim=True)
            cot_p = centred * sdot
            cot_p.addcmul_(sigma, dp, value=-1).add_(do @ vd.transpose(-1, -2))
            cot_s = cot_p.sub_((p * cot_p).sum(-1, keepdim=True)).mul_(p).mul_(scale)
            pdot = sdot.sub_(sigma).mul_(p)
            ds = centred.mul_(p).mul_(scale)
            block.add_rows(cot_dout.transpose(1, 2), pdot @ vb + p @ vd)
            block.add_rows(cot_q, cot_s @ block.k + ds @ kd)
            block.add_cols(cot_k, cot_s.transpose(-1, -2) @ block.q + ds.transpose(-1, -2) @ qd)
            block.add_cols(cot_v, pdot.transpose(-1, -2) @ do)
        return cot_dout, cot_q, cot_k, cot_v, None, None
