"""A product with every group's own weights, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def updated_product(
    x_GMI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, match_GMS: Tensor, factor_GSO: Tensor
) -> Tensor:
    """y = x Wᵀ + b + match · E of every group, [G, M, O]."""
    y = torch.nn.functional.linear(x_GMI, weight_OI, bias_O)
    return y.baddbmm_(match_GMS, factor_GSO)
