"""A linear layer at θ and, for every group of the batch, after each inner step, in dual form.

The inner gradient of a weight W [O, I] is Eᵀ X, with X [S, I] the inputs and E [S, O] the
cotangents of the outputs at the S context tokens of a group. So W' = W − η Eᵀ X is applied as

    y = x W'ᵀ + b' = x Wᵀ + b − η (x Xᵀ + 1) E

and W' is never formed (the 1 is the bias's share: an input column of ones).

In autograd a weight that changes with the group is a *handle*, a tensor without elements: it
carries the dependence of later uses on the inner gradient, so autograd runs the backward of every
use of θ' before the double backward of the context. The values travel beside it: a use of θ' at
inputs U with output cotangents F contributes Fᵀ U to the cotangent of W', and this pair (U, F) is
kept until the cotangents of X and E, −η (E Fᵀ) U and −η (X Uᵀ + 1) F, are formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backend import implementation
from .gradient import WeightGradient
from .guard import differentiable_no_further
from .phase import Phase, handle_like
from .rows import GroupedRows


class Factor:
    """The inner gradient Eᵀ X of every group at one inner step, and the uses of the weights it
    made.

    ``pairs`` holds (U, F, whether the use included the bias).
    """

    def __init__(self, x_GSI: Tensor, e_GSO: Tensor) -> None:
        self.x_GSI, self.e_GSO = x_GSI, e_GSO
        self.pairs: list[tuple[Tensor, Tensor, bool]] = []

    def release(self) -> None:
        """Frees the factor after its last use, while the layer lives on."""
        self.pairs.clear()
        self.x_GSI = self.e_GSO = self.x_GSI.new_empty(0)


class InnerLinear:
    """One weight and bias with the factors of the inner steps taken so far.

    Level k is θ after k inner steps; the weight at level k has the first k factors.

    Args:
        weight_OI: the weight; a transposed view for a layer that stores [I, O].
        bias_O: the bias or None.
        inner_weight, inner_bias: whether the inner step moves them.
        inner_lr: η.
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
        inner_lr: float,
        phase: Phase,
        weight_gradient: WeightGradient | None,
        bias_gradient: WeightGradient | None,
    ) -> None:
        self.weight_OI, self.bias_O = weight_OI, bias_O
        self.inner_weight, self.inner_bias = inner_weight, inner_bias
        self.inner_lr, self.phase = inner_lr, phase
        self.weight_gradient, self.bias_gradient = weight_gradient, bias_gradient
        self.factors: list[Factor] = []

    def product(self, x: Tensor, rows: GroupedRows, level: int, bias: bool = True) -> Tensor:
        """y = x Wᵀ + b − η Σ_k (x X_kᵀ + 1) E_k over the first ``level`` factors."""
        bias_O = self.bias_O if bias else None
        if not self.factors[:level]:
            return torch.nn.functional.linear(x, self.weight_OI, bias_O)
        x_GMI = rows.tokens_to_groups(x)
        terms = [(self._match(x_GMI, f.x_GSI, bias), f.e_GSO) for f in self.factors[:level]]
        y_GMO = self._updated_product(x_GMI, self.weight_OI, bias_O, terms)
        return rows.tokens_from_groups(y_GMO, tuple(x.shape[1:-1]))

    def transposed_product(self, e: Tensor, rows: GroupedRows, level: int) -> Tensor:
        """x̄ = e W − η Σ_k (e E_kᵀ) X_k."""
        if not (self.inner_weight and self.factors[:level]):
            return e @ self.weight_OI
        e_GMO = rows.tokens_to_groups(e)
        terms = [(e_GMO @ f.e_GSO.transpose(1, 2), f.x_GSI) for f in self.factors[:level]]
        dx_GMI = self._updated_product(e_GMO, self.weight_OI.T, None, terms)
        return rows.tokens_from_groups(dx_GMI, tuple(e.shape[1:-1]))

    def record(self, x: Tensor, e: Tensor, rows: GroupedRows, level: int) -> Factor:
        """Keeps the inner gradient at ``level``; it makes the weights of the next one."""
        factor = Factor(rows.tokens_to_groups(x.detach()), rows.tokens_to_groups(e.detach()))
        if self.inner_weight or self.inner_bias:
            if len(self.factors) != level:
                raise RuntimeError(
                    "a linear layer that is used twice in one forward pass is not supported"
                )
            self.factors.append(factor)
        return factor

    def push(self, u_GMI: Tensor, f_GMO: Tensor, level: int, bias: bool = True) -> None:
        """Adds Fᵀ U to the cotangent of the weight at ``level``."""
        f_NO = f_GMO.flatten(0, 1)
        if self.weight_gradient is not None:
            self.weight_gradient.add_product(f_NO, u_GMI.flatten(0, 1))
        if self.bias_gradient is not None and bias:
            self.bias_gradient.add(f_NO.sum(0))
        if self.phase.second_order:
            for factor in self.factors[:level]:
                factor.pairs.append((u_GMI, f_GMO, bias))

    def pull(self, factor: Factor) -> tuple[Tensor | None, Tensor | None]:
        """Cotangents (X̄, Ē) of a factor from the uses of the weights it made; frees them."""
        x_cot: Tensor | None = None
        e_cot: Tensor | None = None
        for u_GMI, f_GMO, bias in factor.pairs:
            match_GSM = self._match(factor.x_GSI, u_GMI, bias)
            e_cot = _add_product(e_cot, match_GSM, f_GMO, -self.inner_lr)
            if self.inner_weight:
                match_GSM = factor.e_GSO @ f_GMO.transpose(1, 2)
                x_cot = _add_product(x_cot, match_GSM, u_GMI, -self.inner_lr)
        factor.pairs.clear()
        return x_cot, e_cot

    def _match(self, a_GMI: Tensor, b_GSI: Tensor, bias: bool) -> Tensor:
        """a bᵀ + 1, as far as the inner step moves the weight and the bias; [G, M, S]."""
        ones = float(self.inner_bias and bias)
        if not self.inner_weight:
            return a_GMI.new_full((len(a_GMI), a_GMI.shape[1], b_GSI.shape[1]), ones)
        match = a_GMI @ b_GSI.transpose(1, 2)
        return match.add_(ones) if ones else match

    def _updated_product(
        self,
        x_GMI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        terms: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """x Wᵀ + b − η Σ match · factor, [G, M, O]."""
        (match_GMS, factor_GSO), *rest = terms
        passes = implementation("linear", x_GMI)
        y_GMO: Tensor = passes.updated_product(
            x_GMI, weight_OI, bias_O, match_GMS, factor_GSO, -self.inner_lr
        )
        for match_GMS, factor_GSO in rest:  # further inner steps
            y_GMO.baddbmm_(match_GMS, factor_GSO, alpha=-self.inner_lr)
        return y_GMO


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """total + scale · a b, in place where there is a total."""
    return (a @ b).mul_(scale) if total is None else total.baddbmm_(a, b, alpha=scale)


def inner_linear(
    x: Tensor, handle: Tensor, layer: InnerLinear, rows: GroupedRows, level: int
) -> Tensor:
    """y[b] = x[b] W'ᵀ + b' with the weight of row b's group after ``level`` inner steps.

    Its backward during an inner step records the inner gradient and is differentiable once more;
    its backward afterwards adds to the outer gradients and is not.

    Args:
        x: [B, …, I].
        handle: the handle of the weight at ``level``.
    """
    return _InnerLinear.apply(x, handle, layer, rows, level)


class _InnerLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        handle: Tensor,
        layer: InnerLinear,
        rows: GroupedRows,
        level: int,
    ) -> Tensor:
        ctx.save_for_backward(x, handle)
        ctx.use = layer, rows, level
        return layer.product(x, rows, level)

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> Any:
        layer, rows, level = ctx.use
        x, handle = ctx.saved_tensors
        if layer.phase.inner_backward:
            dx, dhandle = _InnerLinearBackward.apply(
                e, x, handle, *ctx.use, ctx.needs_input_grad[0]
            )
            return dx if ctx.needs_input_grad[0] else None, dhandle, None, None, None
        differentiable_no_further("inner_linear", "once outside an inner step")
        layer.push(rows.tokens_to_groups(x), rows.tokens_to_groups(e), level)
        dx = layer.transposed_product(e, rows, level) if ctx.needs_input_grad[0] else None
        return dx, handle_like(handle), None, None, None


class _InnerLinearBackward(Function):
    # x̄ = e W', and the inner gradient eᵀ x, of which only the handle is a tensor.
    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        x: Tensor,
        handle: Tensor,
        layer: InnerLinear,
        rows: GroupedRows,
        level: int,
        needs_dx: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.use = layer, rows, level
        ctx.tokens = tuple(x.shape[1:-1])
        ctx.needs_dx, ctx.handle = needs_dx, handle.detach()
        ctx.factor = layer.record(x, e, rows, level)
        dx = layer.transposed_product(e, rows, level) if needs_dx else e.new_empty(0)
        return dx, e.new_empty(0)

    @staticmethod
    def backward(ctx: Any, cot_dx: Tensor, _: Tensor) -> Any:
        differentiable_no_further("inner_linear", "twice")
        layer, rows, level = ctx.use
        factor, ctx.factor = ctx.factor, None
        cot_e, cot_x = None, None
        if ctx.needs_dx:
            layer.push(rows.tokens_to_groups(cot_dx), factor.e_GSO, level, bias=False)
            cot_e = layer.product(cot_dx, rows, level, bias=False)
        x_GSI, e_GSO = layer.pull(factor)
        if e_GSO is not None:
            from_factor = rows.tokens_from_groups(e_GSO, ctx.tokens)
            cot_e = from_factor if cot_e is None else cot_e.add_(from_factor)
        if x_GSI is not None:
            cot_x = rows.tokens_from_groups(x_GSI, ctx.tokens)
        factor.release()
        return cot_e, cot_x, handle_like(ctx.handle), None, None, None, None
