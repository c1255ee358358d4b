"""RMSNorm and LayerNorm: every group's weight and bias is materialised, [G, D]."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..models.families import FAMILIES
from ..ops.norm import add_norm, norm
from ..ops.rate import Rate
from .adapted_layer import AdaptedLayer, MaterialisedLayer, StepState, rule_for


class AdaptedNorm(MaterialisedLayer):
    def __init__(
        self,
        module: Any,
        inner: dict[str, bool],
        state: StepState,
        rate: Rate,
        eps: float,
        center: bool,
    ) -> None:
        super().__init__(module, inner, state, rate)
        self.eps, self.center = eps, center
        self._ahead: tuple[Tensor, int, Tensor] | None = None  # h, its version, and its norm

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is x and ahead[1] == x._version:
            return ahead[2]
        return norm(x, *self._of_rows(), eps=self.eps, center=self.center)

    def add_forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """h = x + residual and its norm."""
        if (x.shape, x.dtype) != (residual.shape, residual.dtype):
            h = x + residual
            return h, self.forward(h)
        return add_norm(x, residual, *self._of_rows(), eps=self.eps, center=self.center)

    def add_ahead(self, x: Tensor, residual: Tensor) -> Tensor:
        """h = x + residual; its norm waits for the next forward, in case that is of this very h."""
        h, y = self.add_forward(x, residual)
        self._ahead = h, h._version, y
        return h

    def release(self) -> None:
        super().release()
        self._ahead = None

    def _of_rows(self) -> tuple[Tensor, Tensor | None]:
        weight = self.of_rows("weight")
        assert weight is not None
        return weight, self.of_rows("bias")


@rule_for("torch.nn.modules.normalization.LayerNorm")
def layer_norm(module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> AdaptedLayer:
    return AdaptedNorm(module, inner, state, rate, module.eps, center=True)


@rule_for(*(family.named(family.rms_norm) for family in FAMILIES if family.rms_norm))
def rms_norm(module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> AdaptedLayer:
    return AdaptedNorm(module, inner, state, rate, module.variance_epsilon, center=False)
