"""RMSNorm and LayerNorm: every group's weight and bias is materialised, [G, D]."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.norm import norm
from .site import Site, StepState, per_group, rule_for


class NormSite(Site):
    def __init__(
        self, module: Any, inner: dict[str, bool], state: StepState, eps: float, center: bool
    ) -> None:
        super().__init__(state)
        self.module, self.eps, self.center = module, eps, center
        self.names = [name for name, moves in inner.items() if moves]
        self.moved = [per_group(getattr(module, name), state.groups) for name in self.names]

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        weight, bias = self._of_rows("weight"), self._of_rows("bias")
        assert weight is not None
        return norm(x, weight, bias, eps=self.eps, center=self.center)

    def _of_rows(self, name: str) -> Tensor | None:
        """Each row's weight or bias, [B, D]; None if the layer has none."""
        rows = self.state.rows
        if name in self.names:
            return self.moved[self.names.index(name)][rows.group_B]
        shared = getattr(self.module, name, None)
        return None if shared is None else shared.expand(len(rows), -1)


@rule_for("torch.nn.modules.normalization.LayerNorm")
def layer_norm(module: Any, inner: dict[str, bool], state: StepState) -> Site:
    return NormSite(module, inner, state, module.eps, center=True)


@rule_for(
    "transformers.models.llama.modeling_llama.LlamaRMSNorm",
    "transformers.models.mistral.modeling_mistral.MistralRMSNorm",
    "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm",
    "transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm",
)
def rms_norm(module: Any, inner: dict[str, bool], state: StepState) -> Site:
    return NormSite(module, inner, state, module.variance_epsilon, center=False)
