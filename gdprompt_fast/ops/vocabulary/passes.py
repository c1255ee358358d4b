"""The passes over the vocabulary: each reads W once and keeps nothing of its size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .block import Block, Columns, Slice, add_product_, column_blocks, wide, wide_product
from .online import OnlineSums
from .state import Adjoint, HeadStep, Projection, Room, Use, Vocabulary
from .target import NLLTarget, Target


def _stream(vocabulary: Vocabulary, rows: Projection, target: Target, terms: range) -> OnlineSums:
    """P W and P B_kᵀ of some rows, with their log-sum-exp; of the target too if it needs them."""
    online = OnlineSums(rows.h_GND, target.rows_per_token)
    for block in vocabulary.blocks(_tokens(vocabulary, rows.h_GND, bool(terms))):
        b = vocabulary.differences(block, terms)
        e = target.exponentials(online, block, vocabulary.logits(block, rows, b))
        products = [e @ b[k].transpose(1, 2) for k in terms]
        online.add([block.expand(e, vocabulary.weight_VD), *products])
    return online


def context_pass(vocabulary: Vocabulary, h_GSD: Tensor, level: int) -> Tensor:
    """Begins the inner step at ``level``: its NLL of every position [G, S], and what its backward
    needs.
    """
    terms = range(vocabulary.terms(level))
    assert vocabulary.next_ids_GS is not None and vocabulary.context_ids_GS is not None
    states, target = vocabulary.project(h_GSD, level), NLLTarget(vocabulary.next_ids_GS)
    online = _stream(vocabulary, states, target, terms)
    mean_row_GSD, *p_b_GSS = online.means()
    step = HeadStep(states, online.lse_GR, mean_row_GSD, torch.zeros_like(online.lse_GR))
    vocabulary.steps.append(step)
    if terms:
        p_context = vocabulary.probabilities_at(vocabulary.context_ids_GS, level)
        step.mean_row_GSD = vocabulary.complete_product(mean_row_GSD, p_b_GSS, p_context, level)
    return target.loss(online)


def state_gradient(vocabulary: Vocabulary, step: HeadStep, level: int) -> Tensor:
    """∂L/∂H = w ∘ (P W' − W'[next token]), [G, S, D]."""
    assert step.weight_GS is not None and vocabulary.next_ids_GS is not None
    difference = step.mean_row_GSD - vocabulary.rows_at(vocabulary.next_ids_GS, level)
    return (step.weight_GS[..., None] * difference).to(step.states.h_GND.dtype)


@dataclass
class Difference:
    """F = softmax(h W'ᵀ) − target, made a block at a time."""

    rows: Projection
    lse_GM: Tensor
    target: Target

    def tile(
        self,
        vocabulary: Vocabulary,
        block: Block,
        b_GSv: dict[int, Tensor],
        out: Tensor | None = None,
    ) -> Tensor:
        """[G, M, v], in the weight's dtype."""
        z = vocabulary.logits(block, self.rows, b_GSv)
        into = vocabulary.weight_VD.dtype if out is None else out
        return self.target.tile(block, z, self.lse_GM, into)


@dataclass
class Response:
    """The outer loss of every row, and its gradient for a unit cotangent."""

    loss_GM: Tensor
    dh_GMD: Tensor
    f: Difference
    use: Use


def response_pass(vocabulary: Vocabulary, h_GMD: Tensor, target: Target, level: int) -> Response:
    """KL(target ‖ softmax(h W'ᵀ)) of every row and its gradient, with F = softmax − target."""
    terms = range(vocabulary.terms(level))
    rows = vocabulary.project(h_GMD, level)
    online = _stream(vocabulary, rows, target, terms)
    loss = target.loss(online)
    f = Difference(rows, online.lse_GR[:, : h_GMD.shape[1]].contiguous(), target)
    f_w, *f_b = target.difference(online, lambda ids: vocabulary.gather(ids, terms))
    f_context = None
    if terms:
        assert vocabulary.context_ids_GS is not None
        parts = [
            f.tile(vocabulary, columns, vocabulary.differences(columns, terms))
            for columns in column_blocks(vocabulary.context_ids_GS)
        ]
        f_context = wide(torch.cat(parts, dim=2))
    dh = vocabulary.complete_product(f_w, f_b, f_context, level).to(h_GMD.dtype)
    return Response(loss, dh, f, Use(h_GMD, f_b, f_context))


def response_weight_pass(vocabulary: Vocabulary, response: Response, level: int) -> None:
    """Adds Fᵀ U to the head's outer gradient, where no other pass makes F again."""
    if vocabulary.gradient is None:
        return
    terms = range(vocabulary.terms(level))
    for block in vocabulary.blocks(_tokens(vocabulary, response.use.u_GMD, bool(terms))):
        f_GMv = response.f.tile(vocabulary, block, vocabulary.differences(block, terms))
        u_GMD = response.use.u_GMD
        vocabulary.add_weight_gradient(block, f_GMv.flatten(0, 1), u_GMD.flatten(0, 1))


def _tokens(vocabulary: Vocabulary, h_GMD: Tensor, with_contexts: bool) -> int:
    """The rows of the largest tile of a pass."""
    own = h_GMD.shape[0] * h_GMD.shape[1]
    if not with_contexts or vocabulary.context_ids_GS is None:
        return own
    return max(own, vocabulary.context_ids_GS.numel())


def begin_adjoint(vocabulary: Vocabulary, step: HeadStep, level: int) -> None:
    """Prepares the double backward of the inner loss at ``level`` from all uses of the weights it
    made.
    """
    assert step.direction_GSD is not None
    a_GSD, direction = step.a_GSD, step.direction_GSD
    center = (wide(direction) * step.mean_row_GSD).sum(-1)
    use_match, lookup_match = [], []
    if vocabulary.inner:
        for use in vocabulary.uses:
            assert use.f_context_GMS is not None
            # [G, M, S] in memory: M may be any number, and matrix units load rows of 16 bytes
            match_GMS = vocabulary.rate.scale_(wide(use.u_GMD) @ a_GSD.transpose(1, 2))
            match = match_GMS.transpose(1, 2)
            f_p = use.f_b_GMS[level] + vocabulary.at_next(use.f_context_GMS)
            center += (match * f_p.transpose(1, 2)).sum(-1)
            use_match.append(match.to(use.u_GMD.dtype))
        for lookup in vocabulary.lookups:
            match = vocabulary.rate.scale_(a_GSD @ wide(lookup.u_GMD).transpose(1, 2))
            center += (match * vocabulary.probabilities_at(lookup.ids_GM, level)).sum(-1)
            lookup_match.append((lookup.ids_GM, match))
    step.adjoint = Adjoint(vocabulary.project(direction, level), use_match, lookup_match, center)


class OuterProduct:
    """Fᵀ U of an inner step's double backward: the cotangents F written below each other, so that
    one product with their rows U reads and writes the gradient once.
    """

    def __init__(
        self, h_GSD: Tensor, direction_GSD: Tensor | None, u_GMD: Tensor | None, dtype: torch.dtype
    ) -> None:
        self._rows = h_GSD, direction_GSD, u_GMD
        self._dtype = dtype
        self._u_ND = torch.cat([rows.flatten(0, 1) for rows in self._rows if rows is not None])

    def room(self, block: Slice) -> Room:
        """Where the parts of F belong in a block."""
        width = block.stop - block.start
        self._f_Nv = self._u_ND.new_empty(len(self._u_ND), width, dtype=self._dtype)
        sizes = [0 if rows is None else len(rows) * rows.shape[1] for rows in self._rows]
        parts = [
            part.view(*rows.shape[:2], width) if rows is not None else None
            for rows, part in zip(self._rows, self._f_Nv.split(sizes), strict=True)
        ]
        return Room(*parts)

    def add_to(self, vocabulary: Vocabulary, block: Slice) -> None:
        """The head's gradient += Fᵀ U at the rows of the block, whose room has been filled."""
        vocabulary.add_weight_gradient(block, self._f_Nv, self._u_ND)
        del self._f_Nv  # before the room of the next block is made


def adjoint_pass(vocabulary: Vocabulary, level: int) -> Tensor:
    """The cotangent of the context's states at ``level``, [G, S, D]; adds this step's share, and
    the response's on the way to the last step, to the head's outer gradient.
    """
    step = vocabulary.steps[level]
    if step.direction_GSD is not None:
        begin_adjoint(vocabulary, step, level)
    terms = range(vocabulary.terms(level))
    h = step.states.h_GND
    last = level == len(vocabulary.steps) - 1
    outer = None
    if vocabulary.gradient is not None:
        u_GMD = vocabulary.uses[0].u_GMD if last and vocabulary.uses else None
        outer = OuterProduct(h, step.direction_GSD, u_GMD, vocabulary.weight_VD.dtype)
    sums: dict[str, Tensor] = {}
    for block in vocabulary.blocks(h.shape[0] * h.shape[1]):
        tile = vocabulary.tile(block, level, outer.room(block) if outer is not None else None)
        z_cot, b = tile.z_cot_GSv, tile.b_GSv[level]
        assert z_cot is not None
        _add_product(sums, "W", z_cot.flatten(0, 1), block.rows_of(vocabulary.weight_VD))
        for k in terms:
            b_T = tile.b_GSv[k].transpose(1, 2)
            _add_product(sums, f"z{k}", z_cot, b_T)
            _add_product(sums, f"b{k}", b, b_T)
        if outer is not None:
            outer.add_to(vocabulary, block)
        del tile, z_cot, b
    z_b, z_context = [sums[f"z{k}"] for k in terms], None
    if terms:
        assert vocabulary.context_ids_GS is not None
        tile = vocabulary.tile(Columns(vocabulary.context_ids_GS), level)
        assert tile.z_cot_GSv is not None
        z_context, b_context = wide(tile.z_cot_GSv), wide(tile.b_GSv[level])
        b_b = [sums[f"b{k}"] for k in terms]
    h_cot = vocabulary.complete_product(sums["W"].view(h.shape), z_b, z_context, level)
    if step.adjoint is not None:
        h_cot = h_cot + _factor_cotangent(vocabulary, step, level)
    if terms:
        assert step.direction_GSD is not None
        vocabulary.add_use(Use(h, z_b, z_context))
        vocabulary.add_use(Use(step.direction_GSD, b_b, b_context))
    return h_cot.to(h.dtype)


def _add_product(sums: dict[str, Tensor], name: str, a: Tensor, b: Tensor) -> None:
    if name in sums:
        add_product_(sums[name], a, b)
    else:
        sums[name] = wide_product(a, b)


def _factor_cotangent(vocabulary: Vocabulary, step: HeadStep, level: int) -> Tensor:
    """w ∘ Ā with Ā = −η Σ (B Fᵀ) U over the uses of the weights this step made, [G, S, D]."""
    total = torch.zeros_like(step.mean_row_GSD)
    if vocabulary.inner:
        for use in vocabulary.uses:
            b_f = use.f_b_GMS[level].transpose(1, 2)
            total.baddbmm_(b_f, wide(use.u_GMD))
        for lookup in vocabulary.lookups:
            b = vocabulary.differences(Columns(lookup.ids_GM), range(level + 1))[level]
            total.baddbmm_(wide(b), wide(lookup.u_GMD))
    assert step.weight_GS is not None
    return vocabulary.rate.scale_(total).mul_(step.weight_GS[..., None])


def lookup_cotangent(vocabulary: Vocabulary) -> Tensor:
    """The cotangent of E, the gradients of the context's lookups: −η Σ onehot(c) Fᵀ U, [G, S,
    D].
    """
    assert vocabulary.context_ids_GS is not None
    groups, tokens = vocabulary.context_ids_GS.shape
    hidden = vocabulary.weight_VD.shape[1]
    total = wide(vocabulary.weight_VD.new_zeros(groups, tokens, hidden))
    for use in vocabulary.uses:
        assert use.f_context_GMS is not None
        total.baddbmm_(use.f_context_GMS.transpose(1, 2), wide(use.u_GMD))
    for lookup in vocabulary.lookups:
        match = Columns(lookup.ids_GM).matches(vocabulary.context_ids_GS, total.dtype)
        total.baddbmm_(match, wide(lookup.u_GMD))
    return vocabulary.rate.scale_(total)
