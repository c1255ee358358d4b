"""The differentiable functions of the vocabulary: the context's loss, the response's loss, the tied
lookup.

Two are part of an inner step, each a :class:`gdprompt_fast.ops.factored.FactoredWeight`. The
response's loss comes after all of them: it has no inner backward to be differentiated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...rows import GroupedRows
from ..embedding import drop_padding, grouped
from ..factored import At, Cotangents, Kept, factored_use
from ..guard import forbid_higher_order, used_twice
from ..phase import Phase
from .block import wide
from .passes import (
    adjoint_pass,
    context_pass,
    lookup_cotangent,
    response_pass,
    response_weight_pass,
    state_gradient,
)
from .state import HeadStep, Lookup, Vocabulary
from .target import Target


class _FactoredVocabulary:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    @property
    def phase(self) -> Phase:
        return self.vocabulary.phase


def context_loss(
    hidden_CTD: Tensor, weight_CT: Tensor, handle: Tensor, vocabulary: Vocabulary, level: int
) -> Tensor:
    """Σ_t weight[c, t] · NLL of the token after position t, at the weights of ``level``; [C].

    Its backward during an inner step records the head's inner gradient and is differentiable once
    more. ``vocabulary.begin_contexts`` has set the contexts.
    """
    assert vocabulary.contexts is not None
    use = _ContextLoss(vocabulary, weight_CT)
    (nll,) = factored_use(use, hidden_CTD, [handle], vocabulary.contexts, level)
    return nll


class _ContextLoss(_FactoredVocabulary):
    """x are the final states of the contexts [C, T, D], e the cotangents of their losses [C]. A
    factor is the :class:`HeadStep`.
    """

    name = "context_loss"

    def __init__(self, vocabulary: Vocabulary, weight_CT: Tensor) -> None:
        super().__init__(vocabulary)
        self._weight_CT = weight_CT

    def apply(self, x: Tensor, at: At) -> tuple[list[Tensor], Kept]:
        with self.vocabulary.present():
            nll_GS = context_pass(self.vocabulary, at.rows.tokens_to_groups(x.detach()), at.level)
        nll_CT1 = at.rows.tokens_from_groups(nll_GS[..., None], tuple(x.shape[1:2]))
        return [(self._weight_CT * nll_CT1[..., 0]).sum(1)], []

    def record(
        self, kept: Kept, es: Cotangents, at: At, needs_dx: bool
    ) -> tuple[HeadStep, Tensor | None]:
        (e,) = es
        if e.requires_grad:
            raise RuntimeError(
                "context_loss: the inner loss must be linear in the NLL of its contexts"
            )
        step = self.vocabulary.steps[at.level]
        step.weight_GS = self._token_weight(e, at.rows)
        if not needs_dx:
            return step, None
        with self.vocabulary.present():
            dh_GSD = state_gradient(self.vocabulary, step, at.level)
        return step, self._of_tokens(dh_GSD, at.rows)

    def add_use(
        self, kept: Kept, es: Cotangents, at: At, needs_dx: bool, cot_x: Tensor | None
    ) -> Tensor:
        if es:
            self.vocabulary.steps[at.level].nll_weight_GS = self._token_weight(es[0], at.rows)
        with self.vocabulary.present():
            h_cot_GSD = adjoint_pass(self.vocabulary, at.level)
        return self._of_tokens(h_cot_GSD, at.rows)

    def factor_cotangents(
        self, factor: HeadStep, cot_dx: Tensor | None, at: At
    ) -> tuple[None, list[None]]:
        assert factor.weight_GS is not None
        if cot_dx is None:
            direction = torch.zeros_like(factor.states.h_GND)
        else:
            direction = at.rows.tokens_to_groups(cot_dx)
        factor.direction_GSD = (wide(direction) * factor.weight_GS[..., None]).to(direction.dtype)
        return None, [None]

    def _token_weight(self, e: Tensor, rows: GroupedRows) -> Tensor:
        """The weight of every position in the loss, [G, S]."""
        return rows.to_groups(self._weight_CT * e.detach()[:, None]).flatten(1)

    def _of_tokens(self, x_GSD: Tensor, rows: GroupedRows) -> Tensor:
        return rows.tokens_from_groups(x_GSD, tuple(self._weight_CT.shape[1:]))


def response_loss(
    hidden_RD: Tensor,
    target: Target,
    handle: Tensor,
    vocabulary: Vocabulary,
    rows: GroupedRows,
    level: int,
) -> Tensor:
    """KL(target ‖ softmax(h W'ᵀ)) of every response token at the weights of ``level``; [R].

    Args:
        hidden_RD: the states that predict the R tokens, with their groups in ``rows``.
        target: of the same tokens in group-major order.
    """
    return _ResponseLoss.apply(hidden_RD, handle, target, vocabulary, rows, level)


class _ResponseLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        handle: Tensor,
        target: Target,
        vocabulary: Vocabulary,
        rows: GroupedRows,
        level: int,
    ) -> Tensor:
        with vocabulary.present():
            response = response_pass(vocabulary, rows.to_groups(hidden.detach()), target, level)
        ctx.use = response, vocabulary, rows, level
        return rows.from_groups(response.loss_GM)

    @staticmethod
    def backward(ctx: Any, cot_loss: Tensor) -> Any:
        forbid_higher_order("response_loss", "once")
        response, vocabulary, rows, level = ctx.use
        weight_GM1 = rows.to_groups(cot_loss)[..., None]
        use = response.use
        use.u_GMD = (wide(use.u_GMD) * weight_GM1).to(use.u_GMD.dtype)
        if vocabulary.inner and vocabulary.phase.second_order and level > 0:
            vocabulary.response = response.f.tile
            vocabulary.add_use(use)
        else:
            vocabulary.add_rate_gradient(use)
            with vocabulary.present():
                response_weight_pass(vocabulary, response, level)
        dh = (wide(response.dh_GMD) * weight_GM1).to(response.dh_GMD.dtype)
        ctx.use = None
        return rows.from_groups(dh), None, None, None, None, None


def tied_lookup(
    ids: Tensor, handle: Tensor, vocabulary: Vocabulary, rows: GroupedRows, level: int
) -> Tensor:
    """W'[ids], the embedding lookup when the head is tied to the embedding; [B, T, D]."""
    (y,) = factored_use(_TiedLookup(vocabulary), ids, [handle], rows, level)
    return y


class _TiedLookup(_FactoredVocabulary):
    """x are ids [B, T], which it keeps, and which are its factor too: E stands with the step."""

    name = "tied_lookup"

    def apply(self, x: Tensor, at: At) -> tuple[list[Tensor], Kept]:
        rows, level = at
        with self.vocabulary.present():
            if not self.vocabulary.terms(level):
                return [torch.nn.functional.embedding(x, self.vocabulary.weight_VD)], [x]
            found = self.vocabulary.rows_at(grouped(x, rows), level)
        found = found.to(self.vocabulary.weight_VD.dtype)
        return [rows.tokens_from_groups(found, tuple(x.shape[1:]))], [x]

    def record(self, kept: Kept, es: Cotangents, at: At, needs_dx: bool) -> tuple[Tensor, None]:
        (ids,), (e,) = kept, es
        if self.vocabulary.inner:
            step = self.vocabulary.steps[at.level]
            if step.lookup_GSD is not None:
                raise used_twice("the tied embedding")
            step.lookup_GSD = at.rows.tokens_to_groups(self._without_padding(e.detach(), ids))
        return ids, None

    def add_use(
        self, kept: Kept, es: Cotangents, at: At, needs_dx: bool, cot_x: Tensor | None
    ) -> None:
        if not es:
            return
        (ids,), (e,), (rows, level) = kept, es, at
        u = self._without_padding(e, ids)
        with self.vocabulary.present(read=self.vocabulary.rate.gradient is not None):
            if self.vocabulary.gradient is not None:
                self.vocabulary.gradient.add_rows(ids.flatten(), u.flatten(0, -2))
            if self.vocabulary.terms(level):
                lookup = Lookup(grouped(ids, rows), rows.tokens_to_groups(u))
                self.vocabulary.add_lookup(lookup, level)

    def factor_cotangents(
        self, factor: Tensor, cot_dx: Tensor | None, at: At
    ) -> tuple[None, list[Tensor | None]]:
        if not self.vocabulary.inner:
            return None, [None]
        cot_GSD = lookup_cotangent(self.vocabulary).to(self.vocabulary.weight_VD.dtype)
        cot_e = at.rows.tokens_from_groups(cot_GSD, tuple(factor.shape[1:]))
        return None, [self._without_padding(cot_e, factor)]

    def _without_padding(self, e: Tensor, ids: Tensor) -> Tensor:
        return drop_padding(e, ids, self.vocabulary.padding_idx)
