"""Linear layers: the update stays in the factors X and E of the context (ops/linear.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.gradient import WeightGradient
from ..ops.handle import weight_handle
from ..ops.linear import InnerLinear, inner_linear
from ..ops.rate import Rate
from .site import FactoredSite, Site, StepState, outer_gradient, rule_for


class LinearSite(FactoredSite):
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
            state.cast(weight.detach().T if transposed else weight.detach()),
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

    def release(self) -> None:
        super().release()
        self.layer.release()

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        x = self.state.cast(x)
        return inner_linear(x, self.handle, self.layer, self.state.rows, self.state.level)


@rule_for("torch.nn.modules.linear.Linear")
def linear(module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> Site:
    return LinearSite(module, inner, state, rate)


@rule_for("transformers.pytorch_utils.Conv1D")
def conv1d(module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> Site:
    return LinearSite(module, inner, state, rate, transposed=True)
