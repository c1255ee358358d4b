"""LoRA adapters: A [r, I] and B [O, r] are small, so every group gets its own (ops/lora.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.lora import lora_product
from ..ops.rate import Rate
from .adapted_layer import MaterialisedLayer, StepState


class AdaptedLowRank(MaterialisedLayer):
    """y = x W'ᵀ + b' with W' [G, O, I] of every group, where I or O is a LoRA rank."""

    def __init__(self, module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> None:
        super().__init__(module, inner, state, rate)
        self.weight_OI = state.cast(module.weight.detach())

    def forward(self, *inputs: Tensor) -> Tensor:
        x, state = self.state.cast(inputs[0]), self.state
        y = lora_product(x, self.weight_OI, self.tensors[0], state.rows, state.level)
        bias_BO = self.of_rows("bias")
        return y if bias_BO is None else y + bias_BO[:, None].to(x.dtype)
