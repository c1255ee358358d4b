"""The differentiable product with weights that the inner step moves (ops/linear.py).

Layers that read the same input share its products and sum what they bring for it in one place.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..rows import GroupedRows
from .backend import implementation
from .factored import At, Cotangents, Kept, factored_use
from .linear import Factor, InnerLinear, Matches, forms_update
from .phase import Phase

Layers = Sequence[InnerLinear]


def inner_linear(
    x: Tensor, handle: Tensor, layer: InnerLinear, rows: GroupedRows, level: int
) -> Tensor:
    """y[b] = x[b] W'ᵀ + b' with the weight of row b's group after ``level`` inner steps; see
    :func:`gdprompt_fast.ops.factored.factored_use`.

    Args:
        x: [B, …, I].
        handle: the handle of the weight at ``level``.
    """
    (y,) = inner_linears(x, [handle], [layer], rows, level)
    return y


def inner_linears(
    x: Tensor, handles: Sequence[Tensor], layers: Layers, rows: GroupedRows, level: int
) -> tuple[Tensor, ...]:
    """:func:`inner_linear` of several layers at the same x.

    Args:
        layers: of one rate, and with the same of weight and bias moved by the inner step.
    """
    return factored_use(_Linears(layers), x, handles, rows, level)


_Factors = tuple[list[Factor], tuple[int, ...]]


class _Linears:
    """Layers at one input, as a :class:`gdprompt_fast.ops.factored.FactoredWeight`.

    Kept are x [B, …, I], and the matches of every layer. A factor of theirs is one of each layer,
    and the shape … of the tokens.
    """

    name = "inner_linear"

    def __init__(self, layers: Layers) -> None:
        self.layers = layers

    @property
    def phase(self) -> Phase:
        return self.layers[0].phase

    def apply(self, x: Tensor, at: At) -> tuple[list[Tensor], Kept]:
        matches, outputs, kept = Matches(), [], list[Tensor | None]([x])
        for layer in self.layers:
            outputs.append(layer.product(x, *at, matches=matches))
            kept += matches if self.phase.second_order else []
        return outputs, kept

    def record(
        self, kept: Kept, es: Cotangents, at: At, needs_dx: bool
    ) -> tuple[_Factors, Tensor | None]:
        """The inner gradients eᵀ x, and x̄ = Σ e W'."""
        (rows, level), x, dx = at, kept[0], None
        tokens = tuple(x.shape[1:-1])
        x_GSI, e_GSOs = rows.tokens_to_groups(x), [rows.tokens_to_groups(e) for e in es]
        factors = [
            layer.record(x_GSI, e_GSO, level)
            for layer, e_GSO in zip(self.layers, e_GSOs, strict=True)
        ]
        if needs_dx:
            dx_GSI, _ = _transposed_product(self.layers, e_GSOs, level)
            dx = rows.tokens_from_groups(dx_GSI, tokens)
        return (factors, tokens), dx

    def add_use(
        self, kept: Kept, es: Cotangents, at: At, needs_dx: bool, cot_x: Tensor | None
    ) -> Tensor | None:
        (rows, level), (x, *matches), dx_GMI = at, kept, cot_x
        x_GMI, each = rows.tokens_to_groups(x), len(matches) // len(self.layers)
        e_GMOs = [rows.tokens_to_groups(e) for e in es]
        cot_matches: list[Matches | None] = [[] for _ in self.layers]
        if needs_dx and es:
            dx_GMI, summed = _transposed_product(self.layers, e_GMOs, level, dx_GMI)
            if summed is not None:
                cot_matches = [summed, *(None for _ in self.layers[1:])]
        for i, (layer, e_GMO) in enumerate(zip(self.layers, e_GMOs, strict=False)):
            own = matches[i * each : (i + 1) * each]
            layer.add_use(x_GMI, e_GMO, level, own, cot_matches[i])
        return None if dx_GMI is None else rows.tokens_from_groups(dx_GMI, tuple(x.shape[1:-1]))

    def factor_cotangents(
        self,
        factor: _Factors,
        cot_dx: Tensor | None,
        at: At,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        (factors, tokens), (rows, level) = factor, at
        cot_x, cot_es = None, []
        matches = Matches()
        for layer, own in zip(self.layers, factors, strict=True):
            direct_GSO = None
            if cot_dx is not None:
                direct = layer.product(cot_dx, rows, level, bias=False, matches=matches)
                direct_GSO, u_GSI = rows.tokens_to_groups(direct), rows.tokens_to_groups(cot_dx)
                layer.add_use(u_GSI, own.e_GSO, level, [*matches], [], double_backward=True)
            cot_x, cot_e = layer.factor_cotangents(own, cot_x, direct_GSO)
            cot_es.append(None if cot_e is None else rows.tokens_from_groups(cot_e, tokens))
            own.release()
        return cot_x, cot_es


def _transposed_product(
    layers: Layers, e_GMOs: Sequence[Tensor], level: int, total_GMI: Tensor | None = None
) -> tuple[Tensor, Matches | None]:
    """x̄ = Σ e W − η Σ_k (Σ e E_kᵀ) X_k, sums over layers at one input, added to ``total_GMI`` in
    place if there is one; and the −η Σ e E_kᵀ, None where the E_kᵀ X_k take fewer products.
    """
    first, e_GMO = layers[0], e_GMOs[0]
    factors = first.factors[:level] if first.inner_weight else []
    updates: list[tuple[Tensor, Tensor]] = []  # −η Σ e E_kᵀ and X_k
    if factors:
        tokens, context, inputs = e_GMO.shape[1], *factors[0].x_GSI.shape[1:]
        if not forms_update(tokens, context, sum(e.shape[2] for e in e_GMOs), inputs):
            updates = [
                (_summed_match(layers, e_GMOs, k), factor.x_GSI) for k, factor in enumerate(factors)
            ]
    products, matches = list(zip(layers, e_GMOs, strict=True)), [match for match, _ in updates]
    if total_GMI is None and updates:
        passes, update = implementation("linear", e_GMO), updates.pop(0)
        weight_IO = products.pop(0)[0].weight_OI.T
        total_GMI = passes.updated_product(e_GMO, weight_IO, None, *update)
    elif total_GMI is None:
        total_GMI = e_GMO @ products.pop(0)[0].weight_OI
    for layer, e_GMO in products:
        total_GMI.flatten(0, 1).addmm_(e_GMO.flatten(0, 1), layer.weight_OI)
    for match, x_GSI in updates:
        total_GMI.baddbmm_(match, x_GSI)
    if not matches:
        for layer, e_GMO in zip(layers, e_GMOs, strict=True):
            for factor in layer.factors[: len(factors)]:
                layer.add_update(total_GMI, e_GMO, factor.e_GSO, factor.x_GSI, False, None)
    return total_GMI, [*matches] or None


def _summed_match(layers: Layers, e_GMOs: Sequence[Tensor], k: int) -> Tensor:
    """−η Σ e E_kᵀ, [G, M, S]."""
    keys = [layer.factors[k].e_GSO.transpose(1, 2) for layer in layers]
    total = e_GMOs[0] @ keys[0]
    for e_GMO, key in zip(e_GMOs[1:], keys[1:], strict=True):
        total.baddbmm_(e_GMO, key)
    return layers[0].rate.scale_(total)
