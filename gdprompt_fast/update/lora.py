"""LoRA adapters: A [r, I] and B [O, r] are small, so every group gets its own, materialised."""

from __future__ import annotations

import torch
from torch import Tensor

from .site import MaterialisedSite


class LowRankSite(MaterialisedSite):
    """y = x Wᵀ + x (W' − W)ᵀ + b' with W' [G, O, I] of every group, where I or O is a LoRA rank.

    In half precision the difference keeps what rounding W' would lose.
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        x = self.state.cast(inputs[0])
        weight, own_BOI = self.state.cast(self.module.weight), self.of_rows("weight")
        assert own_BOI is not None
        change_BOI = (own_BOI - weight).to(x.dtype)
        y = torch.nn.functional.linear(x, weight) + torch.bmm(x, change_BOI.transpose(1, 2))
        bias_BO = self.of_rows("bias")
        return y if bias_BO is None else y + bias_BO[:, None].to(x.dtype)
