"""An embedding table of its own (not tied to the head), with factored inner updates.

A lookup is a linear layer whose inputs are one-hot, so the dual form of ops/linear.py holds with
the match matrix of token ids in place of x Xᵀ:  θ'[q] = θ[q] − η Σ_t 1[c_t = q] e_t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..rows import GroupedRows
from .gradient import WeightGradient
from .guard import forbid_higher_order, used_twice
from .phase import Phase
from .rate import Rate

UNUSED = -1  # the id of an unused place in group-major order; matches no token


class _LookupFactor:
    """Ids and cotangents of the context lookups of one inner step, and the lookups made at θ'
    since.
    """

    def __init__(self, ids_GS: Tensor, e_GSD: Tensor) -> None:
        self.ids_GS, self.e_GSD = ids_GS, e_GSD
        self.pairs: list[tuple[Tensor, Tensor]] = []


class InnerEmbedding:
    """An embedding table [V, D] with the factors of the inner steps taken so far.

    Args:
        weight_VD: the table.
        padding_idx: as in ``nn.Embedding``: no gradient reaches this row.
        inner: whether the inner step moves it.
        rate: η.
        phase: tells the inner backward from the last one.
        gradient: where outer gradients go; None if frozen.
    """

    def __init__(
        self,
        weight_VD: Tensor,
        padding_idx: int | None,
        *,
        inner: bool,
        rate: Rate,
        phase: Phase,
        gradient: WeightGradient | None,
    ) -> None:
        self.weight_VD, self.padding_idx = weight_VD, padding_idx
        self.inner, self.rate, self.phase, self.gradient = inner, rate, phase, gradient
        self.factors: list[_LookupFactor] = []

    def lookup(self, ids: Tensor, rows: GroupedRows, level: int) -> Tensor:
        y = torch.nn.functional.embedding(ids, self.weight_VD)
        for factor in self.factors[:level]:
            change = (
                _matches(rows.to_groups(ids, UNUSED).flatten(1), factor.ids_GS, y.dtype)
                @ factor.e_GSD
            )
            y.add_(rows.tokens_from_groups(self.rate.scale_(change), tuple(ids.shape[1:])))
        return y

    def record(self, ids: Tensor, e: Tensor, rows: GroupedRows, level: int) -> _LookupFactor:
        factor = _LookupFactor(
            rows.to_groups(ids, UNUSED).flatten(1), rows.tokens_to_groups(e.detach())
        )
        if self.inner:
            if len(self.factors) != level:
                raise used_twice("an embedding")
            self.factors.append(factor)
        return factor

    def push(self, ids: Tensor, f: Tensor, rows: GroupedRows, level: int) -> None:
        if self.gradient is not None:
            self.gradient.add_rows(ids.flatten(), f.flatten(0, -2))
        for factor in self.factors[:level]:
            ids_GM, f_GMD = rows.to_groups(ids, UNUSED).flatten(1), rows.tokens_to_groups(f)
            if self.phase.second_order:
                factor.pairs.append((ids_GM, f_GMD))
            if self.rate.gradient is not None:
                matches = _matches(ids_GM, factor.ids_GS, f_GMD.dtype)
                self.rate.add_gradient(matches, f_GMD @ factor.e_GSD.transpose(1, 2))

    def pull(self, factor: _LookupFactor) -> Tensor | None:
        """The cotangent Ē = −η Σ 1[c_t = q] f_q of a factor; frees its uses."""
        total: Tensor | None = None
        for ids_GM, f_GMD in factor.pairs:
            change = _matches(factor.ids_GS, ids_GM, f_GMD.dtype) @ f_GMD
            total = change if total is None else total.add_(change)
        factor.pairs.clear()
        return None if total is None else self.rate.scale_(total)

    def without_padding(self, e: Tensor, ids: Tensor) -> Tensor:
        return drop_padding(e, ids, self.padding_idx)


def drop_padding(e: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
    """Cotangents of a lookup, zero where the id is the padding token's (as in ``nn.Embedding``)."""
    return e if padding_idx is None else e.masked_fill((ids == padding_idx)[..., None], 0.0)


def _matches(a_GM: Tensor, b_GS: Tensor, dtype: torch.dtype) -> Tensor:
    return (a_GM[:, :, None] == b_GS[:, None, :]).to(dtype)


def inner_embedding(
    ids: Tensor, handle: Tensor, table: InnerEmbedding, rows: GroupedRows, level: int
) -> Tensor:
    """y[b, t] = θ'[ids[b, t]] with the table of row b's group after ``level`` inner steps; [B, T,
    D].
    """
    return _InnerEmbedding.apply(handle, ids, table, rows, level)


class _InnerEmbedding(Function):
    @staticmethod
    def forward(
        ctx: Any, handle: Tensor, ids: Tensor, table: InnerEmbedding, rows: GroupedRows, level: int
    ) -> Tensor:
        ctx.save_for_backward(handle, ids)
        ctx.use = table, rows, level
        return table.lookup(ids, rows, level)

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> Any:
        table, rows, level = ctx.use
        handle, ids = ctx.saved_tensors
        if table.phase.inner_backward:
            dhandle = _InnerEmbeddingBackward.apply(e, handle, ids, table, rows, level)
        else:
            forbid_higher_order("inner_embedding", "once outside an inner step")
            table.push(ids, table.without_padding(e, ids), rows, level)
            dhandle = None
        return dhandle, None, None, None, None


class _InnerEmbeddingBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        handle: Tensor,
        ids: Tensor,
        *use: *tuple[InnerEmbedding, GroupedRows, int],
    ) -> Tensor:
        table, rows, level = use
        ctx.table, ctx.rows, ctx.ids = table, rows, ids
        ctx.factor = table.record(ids, table.without_padding(e, ids), rows, level)
        ctx.set_materialize_grads(False)
        return handle.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: None) -> Any:
        forbid_higher_order("inner_embedding", "twice")
        cot_e = ctx.table.pull(ctx.factor)
        if cot_e is not None:
            cot_e = ctx.rows.tokens_from_groups(cot_e, tuple(ctx.ids.shape[1:]))
            cot_e = ctx.table.without_padding(cot_e, ctx.ids)
        return cot_e, None, None, None, None, None
