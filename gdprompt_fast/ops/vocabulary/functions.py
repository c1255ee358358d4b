"""The differentiable functions of the vocabulary: the context's loss, the response's loss, the tied
lookup.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...rows import GroupedRows
from ..embedding import drop_padding
from ..guard import forbid_higher_order, used_twice
from .block import wide
from .passes import (
    adjoint_pass,
    context_pass,
    lookup_cotangent,
    response_pass,
    response_weight_pass,
    state_gradient,
)
from .state import Lookup, Vocabulary
from .target import Target


def context_loss(
    hidden_CTD: Tensor, weight_CT: Tensor, handle: Tensor, vocabulary: Vocabulary, level: int
) -> Tensor:
    """Σ_t weight[c, t] · NLL of the token after position t, at the weights of ``level``; [C].

    Its backward during an inner step records the head's inner gradient and is differentiable once
    more. ``vocabulary.begin_contexts`` has set the contexts.
    """
    nll, _ = _ContextLoss.apply(hidden_CTD, handle, weight_CT, vocabulary, level)
    return nll


class _ContextLoss(Function):
    # The second output has no elements: the inner backward takes it as an input, so that autograd
    # runs the last backward here after the double backward has left the cotangent of ∂L/∂H in the
    # step.
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        handle: Tensor,
        weight: Tensor,
        vocabulary: Vocabulary,
        level: int,
    ) -> tuple[Tensor, Tensor]:
        assert vocabulary.contexts is not None
        h_GSD = vocabulary.contexts.tokens_to_groups(hidden.detach())
        nll_GS = context_pass(vocabulary, h_GSD, level)
        nll_CT = vocabulary.contexts.tokens_from_groups(nll_GS[..., None], hidden.shape[1:2])[
            ..., 0
        ]
        anchor = hidden.new_empty(0)
        ctx.save_for_backward(anchor, handle, weight)
        ctx.use = vocabulary, level
        return (weight * nll_CT).sum(1), anchor

    @staticmethod
    def backward(ctx: Any, cot_nll: Tensor, _: Tensor) -> Any:
        vocabulary, level = ctx.use
        anchor, handle, weight = ctx.saved_tensors
        token_weight = weight * cot_nll.detach()[:, None]
        if vocabulary.phase.inner_backward:
            if cot_nll.requires_grad:
                raise RuntimeError(
                    "context_loss: the inner loss must be linear in the NLL of its contexts"
                )
            dhidden, dhandle = _ContextLossBackward.apply(
                anchor, handle, token_weight, vocabulary, level
            )
            return dhidden, dhandle, None, None, None
        forbid_higher_order("context_loss", "once outside an inner step")
        rows = vocabulary.contexts
        vocabulary.steps[level].nll_weight_GS = rows.to_groups(token_weight).flatten(1)
        dhidden = rows.tokens_from_groups(adjoint_pass(vocabulary, level), weight.shape[1:])
        return dhidden, None, None, None, None


class _ContextLossBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        handle: Tensor,
        token_weight: Tensor,
        vocabulary: Vocabulary,
        level: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.use = vocabulary, level
        rows, step = vocabulary.contexts, vocabulary.steps[level]
        assert rows is not None
        step.weight_GS = rows.to_groups(token_weight).flatten(1)
        dhidden = rows.tokens_from_groups(
            state_gradient(vocabulary, step, level), token_weight.shape[1:]
        )
        return dhidden, handle.new_empty(0)

    @staticmethod
    def backward(ctx: Any, cot_dhidden: Tensor, _: Tensor) -> Any:
        forbid_higher_order("context_loss", "twice")
        vocabulary, level = ctx.use
        step = vocabulary.steps[level]
        direction = vocabulary.contexts.tokens_to_groups(cot_dhidden)
        step.direction_GSD = (wide(direction) * step.weight_GS[..., None]).to(direction.dtype)
        return None, None, None, None, None


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
            response_weight_pass(vocabulary, response, level)
        dh = (wide(response.dh_GMD) * weight_GM1).to(response.dh_GMD.dtype)
        ctx.use = None
        return rows.from_groups(dh), None, None, None, None, None


def tied_lookup(
    ids: Tensor, handle: Tensor, vocabulary: Vocabulary, rows: GroupedRows, level: int
) -> Tensor:
    """W'[ids], the embedding lookup when the head is tied to the embedding; [B, T, D]."""
    return _TiedLookup.apply(handle, ids, vocabulary, rows, level)


class _TiedLookup(Function):
    @staticmethod
    def forward(
        ctx: Any, handle: Tensor, ids: Tensor, *use: *tuple[Vocabulary, GroupedRows, int]
    ) -> Tensor:
        ctx.save_for_backward(handle, ids)
        ctx.use = vocabulary, rows, level = use
        if not vocabulary.terms(level):
            return torch.nn.functional.embedding(ids, vocabulary.weight_VD)
        found = vocabulary.rows_at(rows.to_groups(ids, fill=-1).flatten(1), level)
        found = found.to(vocabulary.weight_VD.dtype)
        return rows.tokens_from_groups(found, ids.shape[1:])

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> Any:
        vocabulary, rows, level = ctx.use
        handle, ids = ctx.saved_tensors
        if vocabulary.phase.inner_backward:
            dhandle = _TiedLookupBackward.apply(e, handle, ids, vocabulary, level)
            return dhandle, None, None, None, None
        forbid_higher_order("tied_lookup", "once outside an inner step")
        u = drop_padding(e, ids, vocabulary.padding_idx)
        if vocabulary.gradient is not None:
            vocabulary.gradient.add_rows(ids.flatten(), u.flatten(0, -2))
        if vocabulary.terms(level):
            ids_GM = rows.to_groups(ids, fill=-1).flatten(1)
            vocabulary.add_lookup(Lookup(ids_GM, rows.tokens_to_groups(u)), level)
        return None, None, None, None, None


class _TiedLookupBackward(Function):
    @staticmethod
    def forward(
        ctx: Any, e: Tensor, handle: Tensor, ids: Tensor, vocabulary: Vocabulary, level: int
    ) -> Tensor:
        ctx.vocabulary, ctx.ids = vocabulary, ids
        if vocabulary.inner:
            assert vocabulary.contexts is not None
            e = drop_padding(e.detach(), ids, vocabulary.padding_idx)
            if vocabulary.steps[level].lookup_GSD is not None:
                raise used_twice("the tied embedding")
            vocabulary.steps[level].lookup_GSD = vocabulary.contexts.tokens_to_groups(e)
        ctx.set_materialize_grads(False)
        return handle.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: None) -> Any:
        forbid_higher_order("tied_lookup", "twice")
        cot_e = None
        if ctx.vocabulary.inner:
            cot_GSD = lookup_cotangent(ctx.vocabulary).to(ctx.vocabulary.weight_VD.dtype)
            cot_e = ctx.vocabulary.contexts.tokens_from_groups(cot_GSD, ctx.ids.shape[1:])
            cot_e = drop_padding(cot_e, ctx.ids, ctx.vocabulary.padding_idx)
        return cot_e, None, None, None, None
