"""Linear layers: the update stays in the factors X and E of the context (ops/linear.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..distributed.sharded import transposed as transpose_of
from ..ops.gradient import WeightGradient
from ..ops.handle import weight_handle
from ..ops.inner_linear import inner_linears
from ..ops.linear import InnerLinear
from ..ops.rate import Rate
from .adapted_layer import (
    AdaptedLayer,
    FactoredLayer,
    LayerChange,
    StepState,
    outer_gradient,
    rule_for,
)
from .change import WeightChange


class AdaptedLinear(FactoredLayer):
    """y = x W'ᵀ + b'. ``transposed``: the module stores its weight as [I, O]."""

    def __init__(
        self,
        module: Any,
        inner: dict[str, bool],
        state: StepState,
        rate: Rate,
        transposed: bool = False,
    ) -> None:
        weight, bias = module.weight, module.bias
        weight_gradient = WeightGradient(weight, transposed) if weight.requires_grad else None
        bias_gradient = outer_gradient(bias)
        self.layer = InnerLinear(
            state.cast(transpose_of(weight) if transposed else weight.detach()),
            None if bias is None else state.cast(bias.detach()),
            inner_weight=inner["weight"],
            inner_bias=inner.get("bias", False),
            rate=rate,
            phase=state.phase,
            weight_gradient=weight_gradient,
            bias_gradient=bias_gradient,
        )
        moves = any(inner.values())
        handle = weight_handle((weight, weight_gradient), (bias, bias_gradient), rate.moving(moves))
        super().__init__(state, rate, handle, moves)

    def factor_tensors(self) -> list[Tensor]:
        return [each for factor in self.layer.factors for each in (factor.x_GSI, factor.e_GSO)]

    def release(self) -> None:
        super().release()
        self.layer.release()

    def change(self, group: int) -> LayerChange:
        """−η Σ_k E_kᵀ X_k, and −η Σ_k E_kᵀ 1 of the bias."""
        layer, eta = self.layer, self.rate.eta_G[group]
        weight, bias_O = WeightChange(*layer.weight_OI.shape), None
        for factor in layer.factors[: self.state.level]:
            e_SO = -eta * factor.e_GSO[group]
            weight.add(e_SO, factor.x_GSI[group])
            own_O = e_SO.sum(0)
            bias_O = own_O if bias_O is None else bias_O + own_O
        return LayerChange(
            weight if layer.inner_weight else None, bias_O if layer.inner_bias else None
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        (y,) = linears([self], inputs[0])
        return y


def linears(adapted_layers: Sequence[AdaptedLinear], x: Tensor) -> tuple[Tensor, ...]:
    """Layers :func:`alike` at the same input."""
    state, handles = (
        adapted_layers[0].state,
        [adapted_layer.handle for adapted_layer in adapted_layers],
    )
    layers = [adapted_layer.layer for adapted_layer in adapted_layers]
    return inner_linears(state.cast(x), handles, layers, state.rows, state.level)


def alike(adapted_layers: Sequence[AdaptedLayer | None]) -> bool:
    """Whether layers can share the products of an input that they all read."""
    kinds = {
        (adapted_layer.rate, adapted_layer.layer.inner_weight, adapted_layer.layer.inner_bias)
        for adapted_layer in adapted_layers
        if isinstance(adapted_layer, AdaptedLinear)
    }
    return len(kinds) == 1 and all(
        isinstance(adapted_layer, AdaptedLinear) for adapted_layer in adapted_layers
    )


@rule_for("torch.nn.modules.linear.Linear")
def linear(module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> AdaptedLayer:
    return AdaptedLinear(module, inner, state, rate)


@rule_for("transformers.pytorch_utils.Conv1D")
def conv1d(module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> AdaptedLayer:
    return AdaptedLinear(module, inner, state, rate, transposed=True)
