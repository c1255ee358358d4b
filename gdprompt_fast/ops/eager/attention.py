"""Causal attention: the three passes, a block of queries at a time. Shapes as in
ops/attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..blocks import block_ranges

# Scores of this many elements are alive at once; queries are taken a block at a time to stay below
# it.
TILE_ELEMENTS = 1 << 21


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """O [B, T, H, D]."""
    batch, heads, tokens, dim = q.shape
    out = q.new_zeros(batch, tokens, heads, dim)
    for block in _blocks(q, k, scale, window):
        block.add_rows(out.transpose(1, 2), block.p @ block.cols(v))
    return out


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV from dO [B, T, H, D]."""
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
    return cot_dout, cot_q, cot_k, cot_v


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
    for start, stop in block_ranges(tokens, size):
        yield _Block(q, k, start, stop, scale, window)
