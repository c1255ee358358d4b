"""A low-rank weight at θ and at every group's θ', materialised: LoRA's A [r, I] and B [O, r].

Weights this small get a copy per group, W' [G, O, I] in fp32 at least, and the inner step is

    W'_g ← W'_g − η Σ_b E_bᵀ X_b        over the rows b and tokens of group g

with X the inputs of the layer and E the cotangents of its outputs. An adapter y = s (x Aᵀ) Bᵀ is
two such layers: with its X and E, A' = A − ηs (E B)ᵀ X and B' = B − ηs Eᵀ (X Aᵀ).

The product and the update are each other's adjoints, so both are differentiable as often as anybody
likes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..rows import GroupedRows
from .backend import implementation


def lora_product(
    x: Tensor, weight_OI: Tensor | None, own_GOI: Tensor, rows: GroupedRows, level: int = 1
) -> Tensor:
    """y[b] = x[b] W'ᵀ with the weight of row b's group.

    In half precision x[b] Wᵀ + x[b] (W' − W)ᵀ: the difference, taken in fp32, keeps what rounding
    W' would lose. The gradient is that of W' alone.

    Args:
        x: [B, …, I].
        weight_OI: W in x's dtype; None for zero.
        own_GOI: W' in fp32, or fp64 for fp64.
        level: at 0 every group's W' is W: the plain product.
    """
    return _LoraProduct.apply(x, weight_OI, own_GOI, rows, level)


def lora_materialise(
    own_GOI: Tensor | None, e: Tensor, x: Tensor, rows: GroupedRows, scale: float
) -> Tensor:
    """W'_g + scale · Σ_b e[b]ᵀ x[b] over the rows b and tokens of group g, [G, O, I] in fp32, or
    fp64 for fp64.

    Args:
        own_GOI: W'; None for zero.
        e: [B, …, O].
        x: [B, …, I], the same dtype.
    """
    return _LoraMaterialise.apply(own_GOI, e, x, rows, scale)


class _LoraProduct(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor | None,
        own_GOI: Tensor,
        rows: GroupedRows,
        level: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OI, own_GOI)
        ctx.use = rows, level
        if level == 0 and weight_OI is not None:
            return torch.nn.functional.linear(x, weight_OI)
        return implementation("lora", x).lora_product(x, weight_OI, own_GOI, rows)

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> Any:
        # x̄ = e W';  W̄' = Σ eᵀ x
        x, weight_OI, own_GOI = ctx.saved_tensors
        rows, level = ctx.use
        dx, down_GOI = None, None
        if ctx.needs_input_grad[0]:
            weight_IO = None if weight_OI is None else weight_OI.T
            dx = lora_product(e, weight_IO, own_GOI.transpose(1, 2), rows, level)
        if ctx.needs_input_grad[2]:
            down_GOI = lora_materialise(None, e, x, rows, 1.0)
        return dx, None, down_GOI, None, None


class _LoraMaterialise(Function):
    @staticmethod
    def forward(
        ctx: Any,
        own_GOI: Tensor | None,
        e: Tensor,
        x: Tensor,
        rows: GroupedRows,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(e, x)
        ctx.rows, ctx.scale = rows, scale
        return implementation("lora", x).lora_materialise(own_GOI, e, x, rows, scale)

    @staticmethod
    def backward(ctx: Any, cot_GOI: Tensor) -> Any:
        # with the cotangent C of the result:  ē = scale · x Cᵀ;  x̄ = scale · e C
        needs_own, needs_e, needs_x, *_ = ctx.needs_input_grad
        e, x = ctx.saved_tensors
        scaled_GOI = ctx.scale * cot_GOI
        cot_e = lora_product(x, None, scaled_GOI, ctx.rows) if needs_e else None
        cot_x = lora_product(e, None, scaled_GOI.transpose(1, 2), ctx.rows) if needs_x else None
        return cot_GOI if needs_own else None, cot_e, cot_x, None, None
