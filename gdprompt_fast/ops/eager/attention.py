"""Causal attention: the three passes, a block of queries at a time. Shapes as in
ops/attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..attention import Kept, Visible
from ..blocks import block_ranges

# Scores of this many elements are alive at once; queries are taken a block at a time to stay below
# it.
TILE_ELEMENTS = 1 << 21


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Visible
) -> tuple[Tensor, Tensor]:
    """O [B, T, H, D] and lse."""
    batch, heads, tokens, dim = q.shape
    out = q.new_zeros(batch, tokens, heads, dim)
    lse = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for block in _blocks(q, k, scale, visible):
        scores = block.visible_scores()
        top = scores.amax(-1, keepdim=True)
        p = torch.softmax(scores, dim=-1, dtype=lse.dtype)
        # At the largest score P is exp(top − lse); quicker than a second pass of exponentials.
        block.add_rows(lse[..., None], top - p.amax(-1, keepdim=True).log())
        block.add_rows(out.transpose(1, 2), p.to(q.dtype) @ block.cols(v))
    return out, lse


def attention_backward(
    dout: Tensor, into: tuple[Tensor, ...] | None, *kept: *Kept
) -> tuple[Tensor, ...]:
    """dQ, dK and dV from dO [B, T, H, D], added to the three ``into`` if given."""
    q, k, v, out, lse, scale, visible = kept
    dq, dk, dv = into or tuple(map(torch.zeros_like, (q, k, v)))
    for block in _blocks(q, k, scale, visible):
        p, do = block.probabilities(lse), block.rows(dout.transpose(1, 2))
        ds = block.centred_dp(do, v, out).mul_(p).mul_(scale)
        block.add_rows(dq, ds @ block.k)
        block.add_cols(dk, ds.transpose(-1, -2) @ block.q)
        block.add_cols(dv, p.transpose(-1, -2) @ do)
    return dq, dk, dv


def attention_double_backward(
    cot_dq: Tensor, cot_dk: Tensor, cot_dv: Tensor, dout: Tensor, *kept: *Kept
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cotangents of dO, Q, K and V from those of dQ, dK and dV."""
    q, k, v, out, lse, scale, visible = kept
    cot_dout = torch.zeros_like(dout)
    cot_q, cot_k, cot_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for block in _blocks(q, k, scale, visible):
        p, do = block.probabilities(lse), block.rows(dout.transpose(1, 2))
        qd, vb = block.rows(cot_dq), block.cols(v)
        kd, vd = block.cols(cot_dk), block.cols(cot_dv)
        centred = block.centred_dp(do, v, out)
        sdot = block.scores(qd, block.k).add_(block.scores(block.q, kd))
        sdot.sub_((p * sdot).sum(-1, keepdim=True))
        cot_s = (do @ vd.transpose(-1, -2)).addcmul_(centred, sdot)
        cot_s.sub_((p * cot_s).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        pdot = sdot.mul_(p)
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
        self, q: Tensor, k: Tensor, queries: range, scale: float, visible: Visible
    ) -> None:
        # Which of these keys a window or a segment hides is on the device, and not waited for.
        self.queries, self.keys = slice(queries.start, queries.stop), slice(0, queries.stop)
        self.scale, self.heads, self.size = scale, k.shape[1], len(queries)
        self.q, self.k = self.rows(q), self.cols(k)
        position = torch.arange(queries.stop, device=q.device)
        query, key = position[self.queries, None], position[self.keys]
        hidden = key > query
        if visible is not None:
            hidden = hidden | (key < visible[0][:, None, None, self.queries, None])
        # [b, S], or [B, 1, 1, b, S]; adding it is several times quicker than filling by a mask
        self.mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, float("-inf"))

    def rows(self, t: Tensor) -> Tensor:
        """Queries of this block: [B, H, T, D] → [B, K, G·b, D]."""
        t = t[:, :, self.queries]
        return t.reshape(t.shape[0], self.heads, -1, t.shape[-1])

    def cols(self, t: Tensor) -> Tensor:
        """Keys of this block: [B, K, T, D] → [B, K, S, D]."""
        return t[:, :, self.keys]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """scale Q Kᵀ, [B, K, G·b, S]."""
        return (q @ k.transpose(-1, -2)).mul_(self.scale)

    def visible_scores(self) -> Tensor:
        """The block's own scores, −∞ where the query does not see the key."""
        s = self.scores(self.q, self.k)
        s.view(*s.shape[:2], -1, self.size, s.shape[-1]).add_(self.mask)
        return s

    def probabilities(self, lse: Tensor) -> Tensor:
        """P = exp(scores − lse), [B, K, G·b, S]."""
        p = self.visible_scores().to(lse.dtype).sub_(self.rows(lse[..., None])).exp_()
        return p.to(self.q.dtype)

    def centred_dp(self, do: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """dP − δ, [B, K, G·b, S]."""
        delta = (do * self.rows(out.transpose(1, 2))).sum(-1, keepdim=True)
        return (do @ self.cols(v).transpose(-1, -2)).sub_(delta)

    def add_rows(self, out: Tensor, t: Tensor) -> None:
        """Adds [B, K, G·b, D] to this block's queries of ``out`` [B, H, T, D]."""
        out[:, :, self.queries] += t.view(out.shape[0], out.shape[1], self.size, out.shape[-1])

    def add_cols(self, out: Tensor, t: Tensor) -> None:
        """Adds [B, K, S, D] to this block's keys of ``out`` [B, K, T, D]."""
        out[:, :, self.keys] += t


def _blocks(q: Tensor, k: Tensor, scale: float, visible: Visible) -> Iterator[_Block]:
    batch, heads, tokens, _ = q.shape
    size = max(1, min(tokens, TILE_ELEMENTS // max(1, batch * heads * tokens)))
    for start, stop in block_ranges(tokens, size):
        yield _Block(q, k, range(start, stop), scale, visible)
