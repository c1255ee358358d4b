"""The head W [V, D] at θ and, for every group, after each inner step, in dual form.

The inner gradient of the head is Σ_t w_t B_tᵀ H_t, with H [S, D] the context's final states, w_t
the weight of position t in the inner loss and B = softmax(z) − onehot(next token), [S, V]. B is far
too large to keep, so it is made again, a block of columns at a time, from H and the log-sum-exp of
its logits z. With A = w ∘ H,

    W' = W − η Σ_k B_kᵀ A_k − η Σ_k onehot(c)ᵀ E_k

where the second sum is there if the head is tied to the embedding: E_k are the cotangents of the
lookups of the context's tokens c. Level k is θ after k inner steps; it has the first k terms of
each sum.

A use of W' at rows U with cotangents F [·, V] contributes Fᵀ U to its cotangent. Every such F is
again made a block at a time, here in :meth:`Vocabulary.tile`; the gradients then need, beside sums
over blocks, only the small products F B_kᵀ, and F at the columns of the context's own tokens.

Letters: G groups, S context positions of a group, M rows of a use, N any of these, v columns of a
    block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from ...rows import GroupedRows
from ..backend import implementation
from ..gradient import Present, WeightGradient, always_present
from ..phase import Phase
from ..rate import Rate
from .block import Block, Columns, Slice, add_product_, slices, wide


class Projection(NamedTuple):
    """Rows h to be multiplied with W'ᵀ at some level: z = h Wᵀ − η Σ_k (h A_kᵀ) B_k − η (h Σ_k
    E_kᵀ) onehot(c).
    """

    h_GND: Tensor
    match_GNS: list[Tensor]  # −η h A_kᵀ, one for each k below the level, in h's dtype
    lookup_match_GNS: Tensor | None  # −η h Σ_k E_kᵀ


@dataclass
class Use:
    """A use of W' at rows U whose cotangent F is made a block at a time."""

    u_GMD: Tensor
    f_b_GMS: list[Tensor]  # F B_kᵀ, one for each k below the use's level
    f_context_GMS: Tensor | None  # F at the context's tokens, F onehot(c)ᵀ


@dataclass
class Lookup:
    """A use of the tied W' as an embedding: F = onehot(ids), U the cotangents of the rows looked
    up.
    """

    ids_GM: Tensor
    u_GMD: Tensor


@dataclass
class Adjoint:
    """What the double backward of one inner step's loss needs to make its cotangents in any
    block.
    """

    direction: Projection  # w ∘ (cotangent of ∂L/∂H)
    use_match_GSM: list[
        Tensor
    ]  # −η A Uᵀ, one for each use of the weights this step made, in U's dtype
    lookup_match: list[tuple[Tensor, Tensor]]  # (ids, −η A Uᵀ), likewise
    center_GS: Tensor  # rowsum(P ∘ cotangent of B)


@dataclass
class HeadStep:
    """The head's share of one inner step."""

    states: Projection  # H
    lse_GS: Tensor
    mean_row_GSD: Tensor  # P W', the probability-weighted mean row
    nll_weight_GS: Tensor  # weight of the position's NLL in the outer loss itself
    weight_GS: Tensor | None = None  # w, known once the inner backward starts
    lookup_GSD: Tensor | None = None  # E
    direction_GSD: Tensor | None = (
        None  # w ∘ (cotangent of ∂L/∂H), if the double backward reached it
    )
    adjoint: Adjoint | None = None

    def of_group(self, one: slice) -> HeadStep:
        """The step of one group, without what a double backward needs."""
        h_GND, match_GNS, lookup_match_GNS = self.states
        own = Projection(h_GND[one], [m[one] for m in match_GNS], _part(lookup_match_GNS, one))
        lse_GS, mean_row_GSD = self.lse_GS[one], self.mean_row_GSD[one]
        parts = _part(self.weight_GS, one), _part(self.lookup_GSD, one)
        return HeadStep(own, lse_GS, mean_row_GSD, self.nll_weight_GS[one], *parts)

    @property
    def a_GSD(self) -> Tensor:
        """A = w ∘ H."""
        assert self.weight_GS is not None
        return wide(self.states.h_GND) * self.weight_GS[..., None]


def _part(x_G: Tensor | None, one: slice) -> Tensor | None:
    return None if x_G is None else x_G[one]


class Tile(NamedTuple):
    """Everything vocabulary-sized, in one block."""

    b_GSv: dict[int, Tensor]  # B_k
    f_GMv: list[Tensor]  # F of every use so far, in the order of Vocabulary.uses
    z_cot_GSv: Tensor | None  # cotangent of the logits of the step asked for


class Room(NamedTuple):
    """Where parts of a tile are to be written, if it matters: the cotangent of the logits and B of
    the step asked for, and F of the response.
    """

    z_cot_GSv: Tensor | None = None
    b_GSv: Tensor | None = None
    f_GMv: Tensor | None = None


@dataclass
class Vocabulary:
    """The head's weight, the inner steps on it and the uses of its levels.

    Args:
        weight_VD: the head; the embedding too if tied_lookup is used with it.
        padding_idx: of the tied embedding.
        inner: whether the inner step moves it.
        rate: η.
        phase: tells the inner backward from the last one.
        gradient: where the outer gradient goes; None if frozen.
        present: what a pass that reads the weight, or adds to its gradient, runs in.
    """

    weight_VD: Tensor
    padding_idx: int | None
    inner: bool
    rate: Rate
    phase: Phase
    gradient: WeightGradient | None
    present: Present = always_present
    steps: list[HeadStep] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    # F of the response in a block, of which it gets B_k
    response: Callable[[Vocabulary, Block, dict[int, Tensor], Tensor | None], Tensor] | None = None
    contexts: GroupedRows | None = None
    context_ids_GS: Tensor | None = None
    next_ids_GS: Tensor | None = None
    tokens_per_context: int = 0

    def begin_contexts(self, context_ids: Tensor, rows: GroupedRows) -> None:
        """Sets the contexts [C, T] that every inner step of this meta step is taken on."""
        self.contexts, self.tokens_per_context = rows, context_ids.shape[1]
        self.context_ids_GS = rows.to_groups(context_ids, fill=-1).flatten(1)
        self.next_ids_GS = rows.to_groups(context_ids.roll(-1, 1), fill=-1).flatten(1)

    def of_group(self, group: int) -> Vocabulary:
        """One group alone, its inner steps without what a double backward needs."""
        assert self.context_ids_GS is not None and self.next_ids_GS is not None
        one = slice(group, group + 1)
        return replace(
            self,
            rate=Rate(self.rate.eta_G[one].detach()),
            steps=[step.of_group(one) for step in self.steps],
            uses=[],
            lookups=[],
            context_ids_GS=self.context_ids_GS[one],
            next_ids_GS=self.next_ids_GS[one],
        )

    def terms(self, level: int) -> int:
        """The number of inner updates in W' at ``level``."""
        return level if self.inner else 0

    def lookup_sum(self, level: int) -> Tensor | None:
        """Σ_k E_k, [G, S, D]; None if there is none."""
        found = [s.lookup_GSD for s in self.steps[: self.terms(level)] if s.lookup_GSD is not None]
        return sum(found[1:], found[0]) if found else None

    def project(self, h_GND: Tensor, level: int) -> Projection:
        h, sum_GSD = wide(h_GND), self.lookup_sum(level)
        match = [
            self.rate.scale_(h @ step.a_GSD.transpose(1, 2))
            for step in self.steps[: self.terms(level)]
        ]
        lookup_match = None
        if sum_GSD is not None:
            lookup_match = self.rate.scale_(h @ wide(sum_GSD).transpose(1, 2))
        return Projection(h_GND, [m.to(h_GND.dtype) for m in match], lookup_match)

    def logits(self, block: Block, rows: Projection, b_GSv: dict[int, Tensor]) -> Tensor:
        """Rows times W'ᵀ at the columns of a block, [G, N, v]; in fp32 or fp64 if W' is not W."""
        updated = bool(rows.match_GNS) or rows.lookup_match_GNS is not None
        z = block.project(rows.h_GND, self.weight_VD, in_wide=updated)
        for k, match_GNS in enumerate(rows.match_GNS):
            add_product_(z, match_GNS, b_GSv[k])
        if rows.lookup_match_GNS is not None:
            assert self.context_ids_GS is not None
            block.add_at_(z, self.context_ids_GS, rows.lookup_match_GNS)
        return z

    def differences(
        self, block: Block, steps: range, out: dict[int, Tensor | None] | None = None
    ) -> dict[int, Tensor]:
        """B_k of the given inner steps in a block, in the weight's dtype, ``out[k]`` if given."""
        b: dict[int, Tensor] = {}
        for k in steps:
            step = self.steps[k]
            z = self.logits(block, step.states, b)
            room = None if out is None else out.get(k)
            b[k] = implementation("vocabulary", z).softmax_minus_one_hot(
                z,
                step.lse_GS,
                self.weight_VD.dtype if room is None else room,
                self.next_ids_GS,
                block.columns,
            )
        return b

    def tile(self, block: Block, down_to: int, room: Room | None = None) -> Tile:
        """B and F of all steps and uses, made in the order of the double backward, ending with the
        cotangent of the logits of step ``down_to``.
        """
        last, room = len(self.steps), room or Room()
        steps = range(last) if self.inner else range(down_to, down_to + 1)
        b = self.differences(block, steps, {down_to: room.b_GSv})
        f: list[Tensor] = []
        if self.response is not None and self.uses:
            f.append(self.response(self, block, b, room.f_GMv))
        z_cot: Tensor | None = None
        for k in reversed(range(down_to, steps.stop)):
            out = room.z_cot_GSv if k == down_to else None
            z_cot = self._logit_cotangent(block, self.steps[k], b, f, k, out)
            f += [z_cot, b[k]]
        return Tile(b, f, z_cot)

    def _logit_cotangent(
        self,
        block: Block,
        step: HeadStep,
        b: dict[int, Tensor],
        f: list[Tensor],
        k: int,
        out: Tensor | None,
    ) -> Tensor:
        """P ∘ (B̄ − rowsum(P ∘ B̄)), plus the share of the NLL itself; B̄ = (w ∘ Ḋ) W'ᵀ − η Σ (A
        Uᵀ) F.
        """
        if step.adjoint is None:
            z_cot = (b[k] * step.nll_weight_GS[..., None]).to(b[k].dtype)
            return z_cot if out is None else out.copy_(z_cot)
        b_bar = self.logits(block, step.adjoint.direction, b)
        for match_GSM, f_GMv in zip(step.adjoint.use_match_GSM, f, strict=False):
            add_product_(b_bar, match_GSM, f_GMv)
        for ids_GM, match_GSM in step.adjoint.lookup_match:
            block.add_at_(b_bar, ids_GM, match_GSM)
        return implementation("vocabulary", b_bar).logit_cotangent(
            b_bar,
            b[k],
            b[k].dtype if out is None else out,
            step.adjoint.center_GS,
            step.nll_weight_GS,
            self.next_ids_GS,
            block.columns,
        )

    def gather(self, ids_GN: Tensor, terms: range) -> list[Tensor]:
        """W[ids] and B_k[:, ids]ᵀ of the given inner steps, [G, N, D] and [G, N, S]."""
        block = Columns(ids_GN)
        b = self.differences(block, terms)
        return [block.rows_of(self.weight_VD), *(b[k].transpose(1, 2) for k in terms)]

    def rows_at(self, ids_GN: Tensor, level: int) -> Tensor:
        """W'[ids] of every group, [G, N, D], in fp32 or fp64."""
        rows, *b_GNS = self.gather(ids_GN, range(self.terms(level)))
        match_GNS = None
        if self.lookup_sum(level) is not None:
            assert self.context_ids_GS is not None
            match_GNS = Columns(self.context_ids_GS).matches(ids_GN, rows.dtype)
        return self.complete_product(rows, b_GNS, match_GNS, level)

    def probabilities_at(self, ids_GN: Tensor, k: int) -> Tensor:
        """P_k at the columns ids, [G, S, N]."""
        block = Columns(ids_GN)
        assert self.next_ids_GS is not None
        b_GSN = wide(self.differences(block, range(k + 1))[k])
        return b_GSN + block.matches(self.next_ids_GS, b_GSN.dtype)

    def at_next(self, f_context_GNS: Tensor) -> Tensor:
        """From F at the context's tokens, F at each position's next token, [G, N, S]."""
        by_context = f_context_GNS.unflatten(2, (-1, self.tokens_per_context))
        return by_context.roll(-1, 3).flatten(2)

    def complete_product(
        self, f_w_GND: Tensor, f_b_GNS: list[Tensor], f_context_GNS: Tensor | None, level: int
    ) -> Tensor:
        """F W' from F W, F B_kᵀ and F at the context's tokens, [G, N, D]; in fp32 or fp64."""
        f_w_GND = wide(f_w_GND)
        for k, f_b in enumerate(f_b_GNS):
            f_w_GND = f_w_GND.baddbmm(self.rate.scaled(wide(f_b)), self.steps[k].a_GSD)
        sum_GSD = self.lookup_sum(level)
        if sum_GSD is not None:
            assert f_context_GNS is not None
            f_w_GND = f_w_GND.baddbmm(self.rate.scaled(wide(f_context_GNS)), wide(sum_GSD))
        return f_w_GND

    def add_use(self, use: Use) -> None:
        """Keeps a use of W' for the double backward of the steps that made it."""
        self.uses.append(use)
        self.add_rate_gradient(use)

    def add_lookup(self, lookup: Lookup, level: int) -> None:
        """Keeps a lookup in W' likewise; in first order only its share of ∂outer/∂η is taken."""
        if self.phase.second_order:
            self.lookups.append(lookup)
        if self.rate.gradient is not None:
            assert self.context_ids_GS is not None
            _, *b_GMS = self.gather(lookup.ids_GM, range(level))
            match_GMS = Columns(self.context_ids_GS).matches(lookup.ids_GM, b_GMS[0].dtype)
            self.add_rate_gradient(Use(lookup.u_GMD, b_GMS, match_GMS))

    def add_rate_gradient(self, use: Use) -> None:
        """∂outer/∂η from a use of W', by every step that made it."""
        if self.rate.gradient is None:
            return
        u_GMD, sum_GSD = wide(use.u_GMD), self.lookup_sum(len(use.f_b_GMS))
        for step, f_b_GMS in zip(self.steps, use.f_b_GMS, strict=False):
            self.rate.add_gradient(u_GMD @ step.a_GSD.transpose(1, 2), f_b_GMS)
        if sum_GSD is not None:
            assert use.f_context_GMS is not None
            match_GMS = u_GMD @ wide(sum_GSD).transpose(1, 2)
            self.rate.add_gradient(match_GMS, use.f_context_GMS)

    def add_weight_gradient(self, block: Slice, f_Nv: Tensor, u_ND: Tensor) -> None:
        """+= Fᵀ U at the rows of a block."""
        if self.gradient is not None:
            self.gradient.add_product_to_rows(block.start, block.stop, f_Nv.to(u_ND.dtype), u_ND)

    def blocks(self, tokens: int) -> list[Slice]:
        return list(slices(len(self.weight_VD), tokens, self.weight_VD.device))
