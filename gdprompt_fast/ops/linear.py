"""A linear layer at θ and, for every group of the batch, after each inner step, in dual form.

The inner gradient of a weight W [O, I] is Eᵀ X, with X [S, I] the inputs and E [S, O] the
cotangents of the outputs at the S context tokens of a group. So W' = W − η Eᵀ X is applied as

    y = x W'ᵀ + b' = x Wᵀ + b − η (x Xᵀ + 1) E

and W' is never formed (the 1 is the bias's share: an input column of ones). Where a group has so
many tokens that Eᵀ X is the cheaper intermediate product, it is formed for one group at a time; the
update is still not rounded into W.

In autograd a weight that changes with the group is a *handle*, a tensor without elements: it
carries the dependence of later uses on the inner gradient, so autograd runs the backward of every
use of θ' before the double backward of the context. The values travel beside it: a use of θ' at
inputs U with output cotangents F contributes Fᵀ U to the cotangent of W', and this pair (U, F) is
kept until the cotangents of X and E, −η (E Fᵀ) U and −η (X Uᵀ + 1) F, are formed.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows import GroupedRows
from .backend import implementation
from .gradient import WeightGradient
from .guard import used_twice
from .phase import Phase
from .rate import Rate

Matches = list[Tensor | None]  # of every factor; None where another product was cheaper


def forms_update(tokens: int, context: int, inputs: int, outputs: int) -> bool:
    """Whether x (Keyᵀ Value) takes fewer products than (x Keyᵀ) Value."""
    through_tokens = tokens * context * (inputs + outputs)
    return through_tokens > (tokens + context) * inputs * outputs


class Use(NamedTuple):
    """A use of W' at U with cotangents F of its outputs, and what its own passes have made of
    them with a factor (X, E).
    """

    u_GMI: Tensor
    f_GMO: Tensor
    bias: bool  # whether it included the bias
    match_GMS: Tensor | None  # −η (U Xᵀ + 1)
    cot_match_GMS: Tensor | None  # −η F Eᵀ, summed over the layers that read U
    brings_x: bool = True  # X̄ is to be had from this use, not from one of another layer


class Factor:
    """The inner gradient Eᵀ X of every group at one inner step, and the uses of the weights it
    made.
    """

    def __init__(self, x_GSI: Tensor, e_GSO: Tensor) -> None:
        self.x_GSI, self.e_GSO = x_GSI, e_GSO
        self.uses: list[Use] = []

    def release(self) -> None:
        """Frees the factor after its last use, while the layer lives on."""
        self.uses.clear()
        self.x_GSI = self.e_GSO = self.x_GSI.new_empty(0)


class InnerLinear:
    """One weight and bias with the factors of the inner steps taken so far.

    Level k is θ after k inner steps; the weight at level k has the first k factors.

    Args:
        weight_OI: the weight; a transposed view for a layer that stores [I, O].
        bias_O: the bias or None.
        inner_weight, inner_bias: whether the inner step moves them.
        rate: η.
        phase: tells the inner backward from the last one.
        weight_gradient, bias_gradient: where outer gradients go; None if frozen.
    """

    def __init__(
        self,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        *,
        inner_weight: bool,
        inner_bias: bool,
        rate: Rate,
        phase: Phase,
        weight_gradient: WeightGradient | None,
        bias_gradient: WeightGradient | None,
    ) -> None:
        self.weight_OI, self.bias_O = weight_OI, bias_O
        self.inner_weight, self.inner_bias = inner_weight, inner_bias
        self.rate, self.phase = rate, phase
        self.weight_gradient, self.bias_gradient = weight_gradient, bias_gradient
        self.factors: list[Factor] = []

    def product(
        self,
        x: Tensor,
        rows: GroupedRows,
        level: int,
        bias: bool = True,
        matches: Matches | None = None,
    ) -> Tensor:
        """y = x Wᵀ + b − η Σ_k (x X_kᵀ + 1) E_k over the first ``level`` factors.

        Args:
            matches: the −η (x X_kᵀ + 1), as far as a layer with the same x, X and η has made them;
                becomes those of this layer.
        """
        bias_O = self.bias_O if bias else None
        factors = [(f.x_GSI, f.e_GSO) for f in self.factors[:level]]
        if not factors:
            return torch.nn.functional.linear(x, self.weight_OI, bias_O)
        x_GMI = rows.tokens_to_groups(x)
        ones = self.inner_bias and bias
        given = [] if matches is None else matches
        y_GMO, made = self._updated_product(x_GMI, self.weight_OI, bias_O, factors, ones, given)
        if matches is not None:
            matches[:] = made
        return rows.tokens_from_groups(y_GMO, tuple(x.shape[1:-1]))

    def record(self, x_GSI: Tensor, e_GSO: Tensor, level: int) -> Factor:
        """Keeps the inner gradient at ``level``; it makes the weights of the next one."""
        moves = self.inner_weight or self.inner_bias
        if self.phase.replaying and moves:
            return self.factors[level]
        factor = Factor(x_GSI.detach(), e_GSO.detach())
        if moves:
            if len(self.factors) != level:
                raise used_twice("a linear layer")
            self.factors.append(factor)
        return factor

    def add_use(
        self,
        u_GMI: Tensor,
        f_GMO: Tensor,
        level: int,
        matches: Matches,
        cot_matches: Matches | None,
        double_backward: bool = False,
    ) -> None:
        """Adds Fᵀ U to the cotangent of the weight at ``level``; and F's sum to that of the bias,
        which a double backward does not meet.

        Args:
            matches, cot_matches: the −η (U X_kᵀ + 1) and −η F E_kᵀ as far as they are formed;
                ``cot_matches`` is None if another layer's use has them summed over both.
        """
        if self.rate.gradient is not None:
            for factor in self.factors[:level]:
                match_GMS = self._match(
                    u_GMI, factor.x_GSI, self.inner_bias and not double_backward
                )
                self.rate.add_gradient(match_GMS, f_GMO @ factor.e_GSO.transpose(1, 2))
        factors = self.factors[:level] if self.phase.second_order else []
        if self.phase.recomputing:
            matches, cot_matches = [], []
        if factors:
            brings_x = cot_matches is not None
            for factor, match, cot_match in zip_longest(factors, matches, cot_matches or []):
                use = Use(u_GMI, f_GMO, not double_backward, match, cot_match, brings_x)
                factor.uses.append(use)
        f_NO = f_GMO.flatten(0, 1)
        if self.weight_gradient is not None:
            # A use of θ' is kept for its factors anyway: it waits for the double backward there.
            wait = bool(factors) and not double_backward
            self.weight_gradient.add_product(f_NO, u_GMI.flatten(0, 1), wait)
        if self.bias_gradient is not None and not double_backward:
            self.bias_gradient.add(f_NO.sum(0))

    def factor_cotangents(
        self, factor: Factor, x_cot: Tensor | None = None, e_cot: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Cotangents (X̄, Ē) of a factor from the uses of the weights it made, added to those given,
        in place; frees the uses.
        """
        for use in factor.uses:
            u, f, ones = use.u_GMI, use.f_GMO, self.inner_bias and use.bias
            e_cot = self._add_transposed(e_cot, use.match_GMS, factor.x_GSI, u, f, ones)
            if self.inner_weight and use.brings_x:
                x_cot = self._add_transposed(x_cot, use.cot_match_GMS, factor.e_GSO, f, u, False)
        factor.uses.clear()
        return x_cot, e_cot

    def _add_transposed(
        self,
        total: Tensor | None,
        match_GMS: Tensor | None,
        key_GSI: Tensor,
        x_GMI: Tensor,
        value_GMO: Tensor,
        ones: bool,
    ) -> Tensor:
        """total − η (Key xᵀ + ones) Value, in place if there is a total; with −η (x Keyᵀ + ones) if
        it is there already.
        """
        if match_GMS is None and not self._forms_update(x_GMI, key_GSI, value_GMO.shape[2]):
            match_GMS = self.rate.scale_(self._match(x_GMI, key_GSI, ones))
        if match_GMS is None:
            if total is None:
                total = value_GMO.new_zeros(*key_GSI.shape[:2], value_GMO.shape[2])
            self.add_update(total, key_GSI, x_GMI, value_GMO, ones, None)
            return total
        transposed_GSM = match_GMS.transpose(1, 2)
        return (
            transposed_GSM @ value_GMO
            if total is None
            else total.baddbmm_(transposed_GSM, value_GMO)
        )

    def release(self) -> None:
        """Drops the activations and cotangents kept for the backward passes."""
        for factor in self.factors:
            factor.release()
        if self.weight_gradient is not None:
            self.weight_gradient.release()

    def _updated_product(
        self,
        x_GMI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        factors: list[tuple[Tensor, Tensor]],
        ones: bool,
        given: Matches,
    ) -> tuple[Tensor, Matches]:
        """x Wᵀ + b − η Σ (x Keyᵀ + ones) Value over factors (Key, Value), [G, M, O]; and the
        −η (x Keyᵀ + ones), as far as they are not formed already.
        """
        matches = [
            self._scaled_match(x_GMI, *factor, ones) if match is None else match
            for factor, match in zip(factors, given or [None] * len(factors), strict=True)
        ]
        y_GMO: Tensor
        if matches[0] is None:
            y_GMO, first = torch.nn.functional.linear(x_GMI, weight_OI, bias_O), 0
        else:
            y_GMO, first = (
                implementation("linear", x_GMI).updated_product(
                    x_GMI, weight_OI, bias_O, matches[0], factors[0][1]
                ),
                1,
            )
        for factor, match in zip(factors[first:], matches[first:], strict=True):
            self.add_update(y_GMO, x_GMI, *factor, ones, match)
        return y_GMO, matches

    def add_update(
        self,
        y_GMO: Tensor,
        x_GMI: Tensor,
        key_GSI: Tensor,
        value_GSO: Tensor,
        ones: bool,
        match_GMS: Tensor | None,
    ) -> None:
        """y −= η (x Keyᵀ + ones) Value, in place; through Keyᵀ Value if there is no match."""
        if match_GMS is not None:
            y_GMO.baddbmm_(match_GMS, value_GSO)
            return
        x_GMI = self.rate.scaled(x_GMI)
        for y_MO, x_MI, key_SI, value_SO in zip(y_GMO, x_GMI, key_GSI, value_GSO, strict=True):
            y_MO.addmm_(x_MI, key_SI.T @ value_SO)
        if ones:
            y_GMO.add_(self.rate.scale_(value_GSO.sum(1, keepdim=True)))

    def _scaled_match(
        self, x_GMI: Tensor, key_GSI: Tensor, value_GSO: Tensor, ones: bool
    ) -> Tensor | None:
        """−η (x Keyᵀ + ones); None if Keyᵀ Value takes fewer products."""
        if self._forms_update(x_GMI, key_GSI, value_GSO.shape[2]):
            return None
        return self.rate.scale_(self._match(x_GMI, key_GSI, ones))

    def _forms_update(self, x_GMI: Tensor, key_GSI: Tensor, outputs: int) -> bool:
        tokens, inputs = x_GMI.shape[1:]
        return self.inner_weight and forms_update(tokens, key_GSI.shape[1], inputs, outputs)

    def _match(self, x_GMI: Tensor, key_GSI: Tensor, ones: bool) -> Tensor:
        """x Keyᵀ + ones, as far as the inner step moves the weight and the bias; [G, M, S]."""
        if not self.inner_weight:
            return x_GMI.new_full((len(x_GMI), x_GMI.shape[1], key_GSI.shape[1]), float(ones))
        match = x_GMI @ key_GSI.transpose(1, 2)
        return match.add_(1.0) if ones else match
