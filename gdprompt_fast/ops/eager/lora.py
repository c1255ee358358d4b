"""A low-rank weight of every group's own: its product and its update. Shapes as in ops/lora.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rows import GroupedRows


def lora_product(x: Tensor, weight_OI: Tensor | None, own_GOI: Tensor, rows: GroupedRows) -> Tensor:
    """y[b] = x[b] W'ᵀ of row b's group; in half precision x[b] Wᵀ + x[b] (W' − W)ᵀ."""
    x_GMI = rows.tokens_to_groups(x)
    if weight_OI is None or own_GOI.dtype == x.dtype:
        y_GMO = x_GMI @ own_GOI.to(x.dtype).transpose(1, 2)
    else:
        change_GOI = (own_GOI - weight_OI).to(x.dtype)
        y_GMO = torch.nn.functional.linear(x_GMI, weight_OI)
        y_GMO.baddbmm_(x_GMI, change_GOI.transpose(1, 2))
    return rows.tokens_from_groups(y_GMO, tuple(x.shape[1:-1]))


def lora_materialise(
    own_GOI: Tensor | None, e: Tensor, x: Tensor, rows: GroupedRows, scale: float
) -> Tensor:
    """W'_g + scale · Σ e[b]ᵀ x[b] over the rows b and tokens of group g, in fp32 at least."""
    product_GOI = rows.tokens_to_groups(e).transpose(1, 2) @ rows.tokens_to_groups(x)
    change_GOI = product_GOI.to(torch.promote_types(x.dtype, torch.float32)).mul_(scale)
    return change_GOI if own_GOI is None else change_GOI.add_(own_GOI)
