"""LoRA adapters: A [r, I] and B [O, r] are small, so every group gets its own (ops/lora.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.lora import InnerLora, inner_lora, stepped
from .site import MaterialisedSite, StepState


class LowRankSite(MaterialisedSite):
    """y = x W'ᵀ + b' with W' [G, O, I] of every group, where I or O is a LoRA rank."""

    def __init__(self, module: Any, inner: dict[str, bool], state: StepState) -> None:
        super().__init__(module, inner, state)
        self.layer = InnerLora(module.weight.detach(), inner_lr=state.inner_lr, phase=state.phase)

    def step(self, gradients: list[Tensor]) -> None:
        weight, after = self.moved.pop(0), gradients.pop(0)
        super().step(gradients)  # the bias, if it moves
        self.moved.insert(0, stepped(weight, after))

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        state = self.state
        y = inner_lora(x, self.moved[0], self.layer, state.rows, state.level)
        bias_BO = self.of_rows("bias")
        return y if bias_BO is None else y + bias_BO[:, None].to(x.dtype)
