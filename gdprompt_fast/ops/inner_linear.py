"""The differentiable product with weights that the inner step moves (ops/linear.py).

Layers that read the same input share its products and sum what they bring for it in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..rows import GroupedRows
from .backend import implementation
from .guard import forbid_higher_order
from .linear import InnerLinear, Matches, forms_update

Layers = Sequence[InnerLinear]


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
    (y,) = inner_linears(x, [handle], [layer], rows, level)
    return y


def inner_linears(
    x: Tensor, handles: Sequence[Tensor], layers: Layers, rows: GroupedRows, level: int
) -> tuple[Tensor, ...]:
    """:func:`inner_linear` of several layers at the same x.

    Args:
        layers: of one rate, and with the same of weight and bias moved by the inner step.
    """
    *outputs, _ = _InnerLinears.apply(x, layers, rows, level, *handles)
    return tuple(outputs)


class _InnerLinears(Function):
    # The last output has no elements: the inner backward takes it as an input in the place of x, so
    # that its double backward runs before the last backward here, and leaves its cotangent of x to
    # be added to.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Layers, rows: GroupedRows, level: int, *handles: Tensor
    ) -> tuple[Tensor, ...]:
        matches, outputs, kept = Matches(), [], list[Tensor | None]()
        for layer in layers:
            outputs.append(layer.product(x, rows, level, matches=matches))
            kept += matches if layer.phase.second_order else []
        anchor = x.new_empty(0)
        ctx.save_for_backward(x, anchor, *handles, *kept)
        ctx.use, ctx.x_cots = (layers, rows, level), list[Tensor]()
        ctx.set_materialize_grads(False)
        return *outputs, anchor

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        layers, rows, level = ctx.use
        x, anchor, *saved = ctx.saved_tensors
        handles, matches = saved[: len(layers)], saved[len(layers) :]
        needs_dx, es = ctx.needs_input_grad[0], _with_zeros(cotangents[:-1], x, layers)
        if layers[0].phase.inner_backward:
            x_cots = ctx.x_cots if needs_dx else None
            dx, *dhandles = _InnerLinearsBackward.apply(
                anchor, x.detach(), layers, rows, level, x_cots, *es, *handles
            )
            return dx if needs_dx else None, None, None, None, *dhandles
        forbid_higher_order("inner_linear", "once outside an inner step")
        dx_GMI = ctx.x_cots.pop() if ctx.x_cots else None
        x_GMI, each = rows.tokens_to_groups(x), len(matches) // len(layers)
        e_GMOs = [rows.tokens_to_groups(e) for e in es]
        cot_matches: list[Matches | None] = [[] for _ in layers]
        if needs_dx and es:
            dx_GMI, summed = _transposed_product(layers, e_GMOs, level, dx_GMI)
            if summed is not None:
                cot_matches = [summed, *(None for _ in layers[1:])]
        for i, (layer, e_GMO) in enumerate(zip(layers, e_GMOs, strict=False)):
            own = matches[i * each : (i + 1) * each]
            layer.add_use(x_GMI, e_GMO, level, own, cot_matches[i])
        dx = None if dx_GMI is None else rows.tokens_from_groups(dx_GMI, tuple(x.shape[1:-1]))
        return dx, None, None, None, *(None for _ in layers)


def _with_zeros(cotangents: Sequence[Tensor | None], x: Tensor, layers: Layers) -> list[Tensor]:
    """Those of all outputs if there is one of any, else none."""
    if all(e is None for e in cotangents):
        return []
    return [
        x.new_zeros(*x.shape[:-1], len(layer.weight_OI)) if e is None else e
        for layer, e in zip(layers, cotangents, strict=True)
    ]


class _InnerLinearsBackward(Function):
    # x̄ = Σ e W', and the inner gradients eᵀ x, of which only the handles are tensors.
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        layers: Layers,
        rows: GroupedRows,
        level: int,
        x_cots: list[Tensor] | None,
        *cotangents_and_handles: Tensor,
    ) -> tuple[Tensor, ...]:
        cotangents = cotangents_and_handles[: len(layers)]
        handles = cotangents_and_handles[len(layers) :]
        ctx.use, ctx.tokens = (layers, rows, level), tuple(x.shape[1:-1])
        ctx.x_cots = x_cots
        ctx.set_materialize_grads(False)
        x_GSI, dx = rows.tokens_to_groups(x), x.new_empty(0)
        e_GSOs = [rows.tokens_to_groups(e) for e in cotangents]
        ctx.factors = [
            layer.record(x_GSI, e_GSO, level) for layer, e_GSO in zip(layers, e_GSOs, strict=True)
        ]
        if x_cots is not None:
            dx_GSI, _ = _transposed_product(layers, e_GSOs, level)
            dx = rows.tokens_from_groups(dx_GSI, ctx.tokens)
        return dx, *(handle.new_empty(0) for handle in handles)

    @staticmethod
    def backward(ctx: Any, cot_dx: Tensor | None, *_: None) -> Any:
        forbid_higher_order("inner_linear", "twice")
        layers, rows, level = ctx.use
        factors, ctx.factors = ctx.factors, []
        matches, cot_x, cot_es = Matches(), None, []
        for layer, factor in zip(layers, factors, strict=True):
            direct_GSO = None
            if cot_dx is not None:
                direct = layer.product(cot_dx, rows, level, bias=False, matches=matches)
                direct_GSO, u_GSI = rows.tokens_to_groups(direct), rows.tokens_to_groups(cot_dx)
                layer.add_use(u_GSI, factor.e_GSO, level, [*matches], [], double_backward=True)
            cot_x, cot_e = layer.factor_cotangents(factor, cot_x, direct_GSO)
            cot_es.append(None if cot_e is None else rows.tokens_from_groups(cot_e, ctx.tokens))
            factor.release()
        if ctx.x_cots is not None and cot_x is not None:
            ctx.x_cots.append(cot_x)
        return None, None, None, None, None, None, *cot_es, *(None for _ in layers)


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
