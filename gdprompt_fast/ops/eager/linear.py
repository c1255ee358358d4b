"""A product with every group's own weights, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def updated_product(
    x_GMI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    match_GMS: Tensor,
    factor_GSO: Tensor,
    scale: float | Tensor,
) -> Tensor:
    """y = x Wᵀ + b + scale · match · E of every group, [G, M, O].

    Args:
        scale: one number, or [G]: a group's own.
    """
    y = torch.nn.functional.linear(x_GMI, weight_OI, bias_O)
    if isinstance(scale, Tensor):
        match_GMS, scale = (match_GMS * scale.view(-1, 1, 1)).to(match_GMS.dtype), 1.0
    return y.baddbmm_(match_GMS, factor_GSO, alpha=scale)
