"""An embedding table of its own (not tied to the head), with factored inner updates.

A lookup is a linear layer whose inputs are one-hot, so the dual form of ops/linear.py holds with
the match matrix of token ids in place of x Xᵀ:  θ'[q] = θ[q] − η Σ_t 1[c_t = q] e_t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import GroupedRows
from .factored import At, Cotangents, Kept, factored_use
from .gradient import Present, WeightGradient, always_present
from .guard import used_twice
from .phase import Phase
from .rate import Rate

UNUSED = -1  # the id of an unused place in group-major order; matches no token


class _LookupFactor:
    """Ids and cotangents of the context lookups of one inner step, and the lookups made at θ'
    since.
    """

    def __init__(self, ids: Tensor, ids_GS: Tensor, e_GSD: Tensor) -> None:
        self.ids, self.ids_GS, self.e_GSD = ids, ids_GS, e_GSD
        self.pairs: list[tuple[Tensor, Tensor]] = []


class InnerEmbedding:
    """An embedding table [V, D] with the factors of the inner steps taken so far, as a
    :class:`gdprompt_fast.ops.factored.FactoredWeight`. Its input are ids [B, T], which it keeps.

    Args:
        weight_VD: the table.
        padding_idx: as in ``nn.Embedding``: no gradient reaches this row.
        inner: whether the inner step moves it.
        rate: η.
        phase: tells the inner backward from the last one.
        gradient: where outer gradients go; None if frozen.
        present: what a pass that reads the table, or adds to its gradient, runs in.
    """

    name = "inner_embedding"

    def __init__(
        self,
        weight_VD: Tensor,
        padding_idx: int | None,
        *,
        inner: bool,
        rate: Rate,
        phase: Phase,
        gradient: WeightGradient | None,
        present: Present = always_present,
    ) -> None:
        self._present = present
        self.weight_VD, self.padding_idx = weight_VD, padding_idx
        self.inner, self.rate, self.phase, self.gradient = inner, rate, phase, gradient
        self.factors: list[_LookupFactor] = []

    def apply(self, x: Tensor, at: At) -> tuple[list[Tensor], Kept]:
        """θ'[ids], [B, T, D]."""
        rows, level = at
        with self._present():
            y = torch.nn.functional.embedding(x, self.weight_VD)
        for factor in self.factors[:level]:
            change = _matches(grouped(x, rows), factor.ids_GS, y.dtype) @ factor.e_GSD
            y.add_(rows.tokens_from_groups(self.rate.scale_(change), tuple(x.shape[1:])))
        return [y], [x]

    def record(
        self, kept: Kept, es: Cotangents, at: At, needs_dx: bool
    ) -> tuple[_LookupFactor, None]:
        (ids,), (e,), (rows, level) = kept, es, at
        e = drop_padding(e.detach(), ids, self.padding_idx)
        factor = _LookupFactor(ids, grouped(ids, rows), rows.tokens_to_groups(e))
        if self.inner:
            if len(self.factors) != level:
                raise used_twice("an embedding")
            self.factors.append(factor)
        return factor, None

    def add_use(
        self, kept: Kept, es: Cotangents, at: At, needs_dx: bool, cot_x: Tensor | None
    ) -> None:
        if not es:
            return
        (ids,), (e,), (rows, level) = kept, es, at
        f = drop_padding(e, ids, self.padding_idx)
        if self.gradient is not None:
            with self._present(read=False):
                self.gradient.add_rows(ids.flatten(), f.flatten(0, -2))
        for factor in self.factors[:level]:
            self._add_to(factor, grouped(ids, rows), rows.tokens_to_groups(f))

    def _add_to(self, factor: _LookupFactor, ids_GM: Tensor, f_GMD: Tensor) -> None:
        if self.phase.second_order:
            factor.pairs.append((ids_GM, f_GMD))
        if self.rate.gradient is not None:
            matches = _matches(ids_GM, factor.ids_GS, f_GMD.dtype)
            self.rate.add_gradient(matches, f_GMD @ factor.e_GSD.transpose(1, 2))

    def factor_cotangents(
        self, factor: _LookupFactor, cot_dx: Tensor | None, at: At
    ) -> tuple[None, list[Tensor | None]]:
        """Ē = −η Σ 1[c_t = q] f_q."""
        total: Tensor | None = None
        for ids_GM, f_GMD in factor.pairs:
            change = _matches(factor.ids_GS, ids_GM, f_GMD.dtype) @ f_GMD
            total = change if total is None else total.add_(change)
        factor.pairs.clear()
        if total is None:
            return None, [None]
        cot_e = at.rows.tokens_from_groups(self.rate.scale_(total), tuple(factor.ids.shape[1:]))
        return None, [drop_padding(cot_e, factor.ids, self.padding_idx)]


def drop_padding(e: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
    """Cotangents of a lookup, zero where the id is the padding token's (as in ``nn.Embedding``)."""
    return e if padding_idx is None else e.masked_fill((ids == padding_idx)[..., None], 0.0)


def grouped(ids: Tensor, rows: GroupedRows) -> Tensor:
    """[B, T] → [G, M·T], with UNUSED in unused places."""
    return rows.to_groups(ids, UNUSED).flatten(1)


def _matches(a_GM: Tensor, b_GS: Tensor, dtype: torch.dtype) -> Tensor:
    return (a_GM[:, :, None] == b_GS[:, None, :]).to(dtype)


def inner_embedding(
    ids: Tensor, handle: Tensor, table: InnerEmbedding, rows: GroupedRows, level: int
) -> Tensor:
    """y[b, t] = θ'[ids[b, t]] with the table of row b's group after ``level`` inner steps; [B, T,
    D].
    """
    (y,) = factored_use(table, ids, [handle], rows, level)
    return y
