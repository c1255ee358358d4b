"""How alike are two ways to use demonstrations? Similarities of states, and of changed answers.

Shapes: N examples, P points in a row (the candidate's token, the query's last token), L layers,
H heads, T columns of the query's text, d the model's width. ``zsl`` is the model alone, ``icl``
with demonstrations in its prompt, ``ft`` after fine-tuning. What is 0/0 is NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..report.cells import Cell

AT_ONCE = 64  # examples in float64


@dataclass(frozen=True)
class Observed:
    """What a model did with N examples.

    Attributes:
        attention: h, [N, P, L, d]: outputs of self-attention.
        scores: m, [N, P, L, H, T]: raw attention scores on the tokens of the query's text, 0 right
            of what the point sees; so T may be that of the longest query.
        predicted: [N] int64, the label, or the token, that it answers.
    """

    attention: Tensor
    scores: Tensor
    predicted: Tensor

    def first(self, count: int | None) -> Observed:
        """The same of the first examples; None: all."""
        return Observed(self.attention[:count], self.scores[:count], self.predicted[:count])


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Over the last dimension; NaN beside a vector of zeros."""
    return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))


def sim_aou(icl: Observed, zsl: Observed, ft: Observed) -> Tensor:
    """Mean over layers of cos(ĥ_ICL − ĥ_ZSL, ĥ_FT − ĥ_ZSL), ĥ = h/‖h‖, [N, P]."""

    def of(icl: Tensor, zsl: Tensor, ft: Tensor) -> Tensor:
        icl, zsl, ft = _unit(icl), _unit(zsl), _unit(ft)
        return cosine(icl - zsl, ft - zsl).mean(-1)

    return _in_parts(of, icl.attention, zsl.attention, ft.attention)


def sim_aou_random(icl: Observed, zsl: Observed, seed: int) -> Tensor:
    """The same with independent U[0, 1) numbers, not centred, in the place of ĥ_FT − ĥ_ZSL."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(icl.attention.shape, generator=generator)

    def of(icl: Tensor, zsl: Tensor, noise: Tensor) -> Tensor:
        return cosine(_unit(icl) - _unit(zsl), noise).mean(-1)

    return _in_parts(of, icl.attention, zsl.attention, noise)


def sim_am(icl: Observed, other: Observed) -> Tensor:
    """Mean over layers and heads of cos(m_ICL, m_other), [N, P]."""

    def of(icl: Tensor, other: Tensor) -> Tensor:
        return cosine(icl, other).mean((-1, -2))

    return _in_parts(of, icl.scores, other.scores)


def sim_am_delta(icl: Observed, zsl: Observed, ft: Observed) -> Tensor:
    """Mean over layers and heads of cos(m_ICL − m_ZSL, m_FT − m_ZSL), [N, P]."""

    def of(icl: Tensor, zsl: Tensor, ft: Tensor) -> Tensor:
        return cosine(icl - zsl, ft - zsl).mean((-1, -2))

    return _in_parts(of, icl.scores, zsl.scores, ft.scores)


def _unit(h: Tensor) -> Tensor:
    return h / h.norm(dim=-1, keepdim=True)


def _in_parts(of: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of float64 tensors [n, …], a few examples at a time."""
    parts = zip(*(each.split(AT_ONCE) for each in tensors), strict=True)
    return torch.cat([of(*(each.double() for each in part)) for part in parts])


@dataclass(frozen=True)
class Ratio:
    """A ratio of two counts over examples.

    Attributes:
        part, whole: what each example counts in both, [N].
    """

    part: Tensor
    whole: Tensor

    def first(self, count: int) -> Ratio:
        """Of the first examples."""
        return Ratio(self.part[:count], self.whole[:count])


@dataclass(frozen=True)
class Answers:
    """Labels that three ways predict for N examples, and the right ones, each [N] int64."""

    zsl: Tensor
    icl: Tensor
    ft: Tensor
    gold: Tensor

    def jaccard(self) -> Ratio:
        """s/(|D_ICL| + |D_FT| − s): D_X the examples that X answers otherwise than ZSL, s those in
        both that moved to the same label.
        """
        return self._jaccard(right=None)

    def jaccard_correct(self) -> Ratio:
        """The same of changes that end in the right label: from wrong to right."""
        return self._jaccard(right=True)

    def jaccard_incorrect(self) -> Ratio:
        """The same of changes that end in a wrong label."""
        return self._jaccard(right=False)

    def _jaccard(self, right: bool | None) -> Ratio:
        icl, ft = self._changes(self.icl, right), self._changes(self.ft, right)
        same = icl & ft & (self.icl == self.ft)
        return Ratio(same, icl.long() + ft.long() - same.long())

    def _changes(self, to: Tensor, right: bool | None) -> Tensor:
        changed = to != self.zsl
        return changed if right is None else changed & ((to == self.gold) == right)

    def rec2ftp(self) -> Ratio:
        """Of the examples that fine-tuning sets right, those that ICL answers right too."""
        set_right = self.to_right(self.ft)
        return Ratio(set_right & (self.icl == self.gold), set_right)

    def icl_of_wrong(self) -> Ratio:
        """Of all that ZSL answers wrong, what ICL answers right."""
        wrong = self.zsl != self.gold
        return Ratio(wrong & (self.icl == self.gold), wrong)

    def to_right(self, by: Tensor) -> Tensor:
        """The examples that ``by`` answers right and ZSL wrong, [N] bool."""
        return (self.zsl != self.gold) & (by == self.gold)


RATIOS: dict[str, Callable[[Answers], Ratio]] = {
    "Jaccard": Answers.jaccard,
    "Jaccard – correct": Answers.jaccard_correct,
    "Jaccard – incorrect": Answers.jaccard_incorrect,
    "Rec2FTP": Answers.rec2ftp,
}


@dataclass(frozen=True)
class RatioCell(Cell):
    """A ratio of the counts of all seeds together.

    Attributes:
        ratios: of every seed.
    """

    ratios: tuple[Ratio, ...] = field(default=(), compare=False)

    @property
    def of_each_seed(self) -> list[float]:
        """The ratio of every seed's own counts."""
        return [float(each.part.sum().double() / each.whole.sum()) for each in self.ratios]

    def first(self, counts: Sequence[int]) -> Cell:
        """The ratio of the counts of so many first examples of every seed."""
        return ratio_cell([r.first(n) for r, n in zip(self.ratios, counts, strict=True)])


def ratio_cell(ratios: Sequence[Ratio]) -> RatioCell:
    """The ratio R of the counts of all seeds together; NaN if nothing is counted.

    An example's value is R + (part − R whole)/mean(whole): where seeds have as many examples their
    mean is R, and their standard errors, over examples and over seeds, are the delta method's.
    """
    parts, wholes = ([getattr(each, key).double() for each in ratios] for key in ("part", "whole"))
    part, whole = torch.cat(parts), torch.cat(wholes)
    ratio, mean = part.sum() / whole.sum(), whole.mean()
    return RatioCell(
        tuple(
            tuple((ratio + (one - ratio * all_) / mean).tolist())
            for one, all_ in zip(parts, wholes, strict=True)
        ),
        ratios=tuple(ratios),
    )


def kendall_tau(one: Tensor, other: Tensor) -> Tensor:
    """Kendall's τ-b of rows [..., C] of numbers, over C; NaN for a row of equal numbers."""
    a, b = ((x[..., :, None] - x[..., None, :]).sign() for x in (one.double(), other.double()))
    pairs = (-1, -2)
    return (a * b).sum(pairs) / ((a * a).sum(pairs) * (b * b).sum(pairs)).sqrt()


def recall_of_top(one: Tensor, other: Tensor, count: int) -> Tensor:
    """The share of the ``count`` largest of ``other`` among those of ``one``, rows [..., C]."""
    largest = [x.topk(count, dim=-1).indices for x in (one, other)]
    shared = (largest[0][..., :, None] == largest[1][..., None, :]).any(-1)
    return shared.double().mean(-1)
