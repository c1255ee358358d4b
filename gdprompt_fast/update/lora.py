"""LoRA adapters: A [r, I] and B [O, r] are small, so every group gets its own, materialised."""

from __future__ import annotations

import torch
from torch import Tensor

from .site import MaterialisedSite


class LowRankSite(MaterialisedSite):
    """y = x W'ᵀ + b' with W' [G, O, I] of every group, where I or O is a LoRA rank."""

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        weight_BOI, bias_BO = self.of_rows("weight"), self.of_rows("bias")
        assert weight_BOI is not None
        y = torch.bmm(x, weight_BOI.transpose(1, 2))
        return y if bias_BO is None else y + bias_BO[:, None]
