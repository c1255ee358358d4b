"""RMSNorm and LayerNorm: every group's weight and bias is materialised, [G, D]."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..models.families import FAMILIES
from ..ops.norm import norm
from ..ops.rate import Rate
from .site import MaterialisedSite, Site, StepState, rule_for


class NormSite(MaterialisedSite):
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

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        weight, bias = self.of_rows("weight"), self.of_rows("bias")
        assert weight is not None
        return norm(x, weight, bias, eps=self.eps, center=self.center)


@rule_for("torch.nn.modules.normalization.LayerNorm")
def layer_norm(module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> Site:
    return NormSite(module, inner, state, rate, module.eps, center=True)


@rule_for(*(family.named(family.rms_norm) for family in FAMILIES if family.rms_norm))
def rms_norm(module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> Site:
    return NormSite(module, inner, state, rate, module.variance_epsilon, center=False)
