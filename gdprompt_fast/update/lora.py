"""LoRA adapters: A [r, I] and B [O, r] are small, so every group gets its own, materialised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .site import Site, StepState, per_group


class LowRankSite(Site):
    """y = x W'ᵀ + b' with W' [G, O, I] of every group, where I or O is a LoRA rank."""

    def __init__(self, module: Any, inner: dict[str, bool], state: StepState) -> None:
        super().__init__(state)
        self.module = module
        self.names = [name for name, moves in inner.items() if moves]
        self.moved = [per_group(getattr(module, name), state.groups) for name in self.names]

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        own = dict(zip(self.names, self.moved, strict=True))
        weight_BOI = self._of_rows(own.get("weight"), self.module.weight)
        y = torch.bmm(x, weight_BOI.transpose(1, 2))
        if self.module.bias is not None:
            y = y + self._of_rows(own.get("bias"), self.module.bias)[:, None]
        return y

    def _of_rows(self, own_G: Tensor | None, shared: Tensor) -> Tensor:
        """Each row's parameter, [B, *shape]."""
        rows = self.state.rows
        return shared.expand(len(rows), *shared.shape) if own_G is None else own_G[rows.group_B]
