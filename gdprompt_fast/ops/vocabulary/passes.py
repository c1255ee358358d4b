"""The passes over the vocabulary: each reads W once and keeps nothing of its size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .block import Columns, column_blocks, wide
from .state import Adjoint, HeadStep, Projection, Use, Vocabulary
from .target import Target


class _OnlineSoftmax:
    """Sums over the vocabulary weighted by softmax(z), one block at a time (as in
    FlashAttention).
    """

    def __init__(self, like_GND: Tensor) -> None:
        wide_like = wide(like_GND)
        self.top_GN = wide_like.new_full(like_GND.shape[:2], float("-inf"))
        self.total_GN = torch.zeros_like(self.top_GN)
        self.sums: dict[str | int, Tensor] = {}

    def exponentials(self, z_GNv: Tensor) -> Tensor:
        """e^(z − running maximum), after scaling what has been summed to the new maximum."""
        top = torch.maximum(self.top_GN, z_GNv.amax(-1))
        shrink = (self.top_GN - top).exp_()
        self.top_GN = top
        for total in self.sums.values():
            total.mul_(shrink[..., None])
        e = (z_GNv - top[..., None]).exp_()
        self.total_GN = self.total_GN * shrink + e.sum(-1)
        return e

    def add(self, name: str | int, value: Tensor) -> None:
        _add(self.sums, name, value)

    @property
    def lse_GN(self) -> Tensor:
        return self.top_GN + self.total_GN.log()

    def mean(self, name: str | int) -> Tensor:
        return self.sums[name] / self.total_GN[..., None]


def _add(sums: dict, name: str | int, value: Tensor) -> None:
    if name in sums:
        sums[name].add_(value)
    else:
        sums[name] = value


def context_pass(vocabulary: Vocabulary, h_GSD: Tensor, level: int) -> Tensor:
    """Begins the inner step at ``level``: its NLL of every position [G, S], and what its backward
    needs.
    """
    terms = range(vocabulary.terms(level))
    states = vocabulary.project(h_GSD, level)
    online = _OnlineSoftmax(h_GSD)
    assert vocabulary.next_ids_GS is not None and vocabulary.context_ids_GS is not None
    next_logit = torch.zeros_like(online.top_GN)
    for block in vocabulary.blocks(online.top_GN.numel()):
        p, b = vocabulary.softmaxes(block, terms)
        z = vocabulary.logits(block, states, b)
        next_logit += block.pick(z, vocabulary.next_ids_GS)
        e = online.exponentials(z)
        online.add("W", block.expand(e, vocabulary.weight_VD))
        for k in terms:
            online.add(k, e @ p[k].transpose(1, 2))
    step = HeadStep(states, online.lse_GN, mean_row_GSD=online.mean("W"))
    vocabulary.steps.append(step)
    if terms:
        p_context = vocabulary.softmaxes(Columns(vocabulary.context_ids_GS), range(level + 1))[0][
            level
        ]
        step.mean_row_GSD = vocabulary.complete_product(
            step.mean_row_GSD, [online.mean(k) for k in terms], p_context, level
        )
    return step.lse_GS - next_logit


def state_gradient(vocabulary: Vocabulary, step: HeadStep, level: int) -> Tensor:
    """∂L/∂H = w ∘ (P W' − W'[next token]), [G, S, D]."""
    assert step.weight_GS is not None and vocabulary.next_ids_GS is not None
    difference = step.mean_row_GSD - wide(vocabulary.rows_at(vocabulary.next_ids_GS, level))
    return (step.weight_GS[..., None] * difference).to(step.states.h_GND.dtype)


@dataclass
class Response:
    """The outer loss of every row, and its gradient for a unit cotangent."""

    loss_GM: Tensor
    dh_GMD: Tensor
    rows: Projection
    lse_GM: Tensor
    use: Use


def response_pass(vocabulary: Vocabulary, h_GMD: Tensor, target: Target, level: int) -> Response:
    """KL(target ‖ softmax(h W'ᵀ)) of every row and its gradient, with F = softmax − target."""
    terms = range(vocabulary.terms(level))
    rows = vocabulary.project(h_GMD, level)
    online = _OnlineSoftmax(h_GMD)
    sums: dict[str | int, Tensor] = {}
    for block in vocabulary.blocks(_tokens(vocabulary, h_GMD, bool(terms))):
        p, b = vocabulary.softmaxes(block, terms)
        z = vocabulary.logits(block, rows, b)
        t = target.probabilities(block)
        e = online.exponentials(z)
        _add(sums, "z", (t * z).sum(-1))
        _add(sums, "W", block.expand(t, vocabulary.weight_VD))
        online.add("W", block.expand(e, vocabulary.weight_VD))
        for k in terms:
            p_T = p[k].transpose(1, 2)
            _add(sums, k, t @ p_T)
            online.add(k, e @ p_T)
    f_p = [online.mean(k) - sums[k] for k in terms]
    f_context = None
    if terms:
        assert vocabulary.context_ids_GS is not None
        parts = []
        for columns in column_blocks(vocabulary.context_ids_GS):
            _, b = vocabulary.softmaxes(columns, terms)
            student = (vocabulary.logits(columns, rows, b) - online.lse_GN[..., None]).exp_()
            parts.append(student - target.probabilities(columns))
        f_context = torch.cat(parts, dim=2)
    dh = vocabulary.complete_product(online.mean("W") - sums["W"], f_p, f_context, level)
    loss = online.lse_GN - sums["z"] + target.negative_entropy
    return Response(loss, dh.to(h_GMD.dtype), rows, online.lse_GN, Use(h_GMD, f_p, f_context))


def response_weight_pass(
    vocabulary: Vocabulary, response: Response, target: Target, weighted_h_GMD: Tensor, level: int
) -> None:
    """Adds Fᵀ (weight ∘ h) to the head's outer gradient, where no other pass makes F again."""
    if vocabulary.gradient is None:
        return
    terms = range(vocabulary.terms(level))
    for block in vocabulary.blocks(_tokens(vocabulary, weighted_h_GMD, bool(terms))):
        _, b = vocabulary.softmaxes(block, terms)
        student = vocabulary.logits(block, response.rows, b).sub_(response.lse_GM[..., None]).exp_()
        f_GMv = student.sub_(target.probabilities(block))
        vocabulary.add_weight_gradient(block, f_GMv, weighted_h_GMD)


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
            match = a_GSD @ wide(use.u_GMD).transpose(1, 2)
            center -= vocabulary.inner_lr * (match * use.f_p_GMS[level].transpose(1, 2)).sum(-1)
            use_match.append(match)
        for lookup in vocabulary.lookups:
            match = a_GSD @ wide(lookup.u_GMD).transpose(1, 2)
            p = vocabulary.softmaxes(Columns(lookup.ids_GM), range(level + 1))[0][level]
            center -= vocabulary.inner_lr * (match * p).sum(-1)
            lookup_match.append((lookup.ids_GM, match))
    step.adjoint = Adjoint(vocabulary.project(direction, level), use_match, lookup_match, center)


def adjoint_pass(vocabulary: Vocabulary, level: int) -> Tensor:
    """The cotangent of the context's states at ``level``, [G, S, D]; adds this step's share, and
    the response's on the way to the last step, to the head's outer gradient.
    """
    step = vocabulary.steps[level]
    last = level == len(vocabulary.steps) - 1
    if step.direction_GSD is not None:
        begin_adjoint(vocabulary, step, level)
    terms = range(vocabulary.terms(level))
    h = step.states.h_GND
    sums: dict[str | int, Tensor] = {}
    for block in vocabulary.blocks(h.shape[0] * h.shape[1]):
        tile = vocabulary.tile(block, level)
        z_cot, b = tile.z_cot_GSv, tile.b_GSv[level]
        assert z_cot is not None
        _add(sums, "W", block.expand(z_cot, vocabulary.weight_VD))
        for k in terms:
            p_T = tile.p_GSv[k].transpose(1, 2)
            _add(sums, f"z{k}", z_cot @ p_T)
            _add(sums, f"b{k}", b @ p_T)
        vocabulary.add_weight_gradient(block, z_cot, h)
        if step.direction_GSD is not None:
            vocabulary.add_weight_gradient(block, b, step.direction_GSD)
        if last and vocabulary.uses:
            vocabulary.add_weight_gradient(block, tile.f_GMv[0], vocabulary.uses[0].u_GMD)
    z_context = None
    if terms:
        assert vocabulary.context_ids_GS is not None and step.direction_GSD is not None
        tile = vocabulary.tile(Columns(vocabulary.context_ids_GS), level)
        z_context = tile.z_cot_GSv
    z_p = [sums[f"z{k}"] for k in terms]
    h_cot = vocabulary.complete_product(sums["W"], z_p, z_context, level)
    if step.adjoint is not None:
        h_cot = h_cot + _factor_cotangent(vocabulary, step, level)
    if terms:
        assert step.direction_GSD is not None
        b_p = [sums[f"b{k}"] for k in terms]
        vocabulary.uses.append(Use(h, z_p, z_context))
        vocabulary.uses.append(Use(step.direction_GSD, b_p, tile.b_GSv[level]))
    return h_cot.to(h.dtype)


def _factor_cotangent(vocabulary: Vocabulary, step: HeadStep, level: int) -> Tensor:
    """w ∘ Ā with Ā = −η Σ (B Fᵀ) U over the uses of the weights this step made, [G, S, D]."""
    total = torch.zeros_like(step.mean_row_GSD)
    if vocabulary.inner:
        for use in vocabulary.uses:
            assert use.f_context_GMS is not None
            f_b = use.f_p_GMS[level] - vocabulary.at_next(use.f_context_GMS)
            total.baddbmm_(f_b.transpose(1, 2), wide(use.u_GMD), alpha=-vocabulary.inner_lr)
        for lookup in vocabulary.lookups:
            b = vocabulary.softmaxes(Columns(lookup.ids_GM), range(level + 1))[1][level]
            total.baddbmm_(b, wide(lookup.u_GMD), alpha=-vocabulary.inner_lr)
    assert step.weight_GS is not None
    return total.mul_(step.weight_GS[..., None])


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
        total.baddbmm_(
            use.f_context_GMS.transpose(1, 2), wide(use.u_GMD), alpha=-vocabulary.inner_lr
        )
    for lookup in vocabulary.lookups:
        match = Columns(lookup.ids_GM).matches(vocabulary.context_ids_GS, total.dtype)
        total.baddbmm_(match, wide(lookup.u_GMD), alpha=-vocabulary.inner_lr)
    return total
