"""RMSNorm and LayerNorm with a weight and bias of their own for every row of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .backend import implementation
from .guard import forbid_higher_order
from .left import Left

# γ, β, ε and whether the mean is taken off: of the forward passes of each backend.
Options = tuple[Tensor, Tensor | None, float, bool]
# What they leave for the backward passes: x (h, after a sum), γ, μ and r.
Kept = tuple[Tensor, Tensor, Tensor | None, Tensor]


def norm(
    x: Tensor, weight_BD: Tensor, bias_BD: Tensor | None, *, eps: float, center: bool
) -> Tensor:
    """y = x̂ ∘ γ + β with x̂ = (x − μ) r, r = (mean((x − μ)²) + ε)^-½; μ = 0 unless ``center``.

    LayerNorm with ``center``, RMSNorm without. Twice differentiable; fp32 inside for half
    precision.

    Args:
        x: [B, …, D].
        weight_BD, bias_BD: [B, D], one row for each x[b].
    """
    y, _ = _Norm.apply(x, weight_BD, bias_BD, eps, center)
    return y


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight_BD: Tensor,
    bias_BD: Tensor | None,
    *,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor]:
    """h = x + residual and y = norm(h), in one pass; twice differentiable.

    The backward adds the cotangent of h to that of y in the same pass too.

    Args:
        x, residual: [B, …, D], of one dtype.
        weight_BD, bias_BD, eps, center: as of :func:`norm`.

    Returns:
        h, y.

    Raises:
        ValueError: if x and the residual differ in shape or dtype.
    """
    if (x.shape, x.dtype) != (residual.shape, residual.dtype):
        raise ValueError(
            f"residual: expected {x.dtype} {list(x.shape)} as x, "
            f"got {residual.dtype} {list(residual.shape)}"
        )
    h, y, _ = _AddNorm.apply(x, residual, weight_BD, bias_BD, eps, center)
    return h, y


class _Norm(Function):
    # The last output of both is an anchor (ops/left.py): the double backward runs before the last
    # backward, which adds to the cotangent of x that it leaves.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
    ) -> tuple[Tensor, Tensor]:
        y, mean, rstd = implementation("norm", x).norm_forward(x, weight, bias, eps, center)
        return y, _keep(ctx, bias is not None, x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> Any:
        dx, dweight, dbias = _backward(ctx, dy, None)
        return dx, dweight, dbias, None, None


class _AddNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, *options: *Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, *_ = options
        h, y, mean, rstd = implementation("norm", x).add_norm_forward(x, residual, *options)
        return h, y, _keep(ctx, bias is not None, h, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dy: Tensor | None, _: Tensor | None) -> Any:
        dx, dweight, dbias = _backward(ctx, dy, dh)
        return dx, dx, dweight, dbias, None, None


def _keep(ctx: Any, with_bias: bool, *kept: *Kept) -> Tensor:
    """Keeps what the backward passes of a norm need; its anchor."""
    anchor, ctx.left, ctx.with_bias = kept[0].new_empty(0), Left(), with_bias
    ctx.save_for_backward(anchor, *kept)
    ctx.set_materialize_grads(False)
    return anchor


def _backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> Any:
    """dx + dh, dγ and dβ."""
    anchor, x, *kept = ctx.saved_tensors
    if dy is None:
        (left,) = ctx.left.take() or (None,)
        return (dh if left is None else left if dh is None else left.add_(dh)), None, None
    if torch.is_grad_enabled():
        # Detached: how y depends on x is part of the double backward.
        return _NormBackward.apply(dy, dh, ctx.with_bias, anchor, ctx.left, x.detach(), *kept)
    (into,) = ctx.left.take() or (None,)
    return implementation("norm", dy).norm_backward(dy, dh, into, ctx.with_bias, x, *kept)


class _NormBackward(Function):
    # dx = r (g − x̂ mean(g ∘ x̂) − mean(g)) + dh, g = dy ∘ γ;  dγ = Σ_t dy ∘ x̂;  dβ = Σ_t dy
    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        dh: Tensor | None,
        with_bias: bool,
        anchor: Tensor,
        left: Left,
        *kept: *Kept,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(dy, *kept)
        ctx.adds_dh, ctx.left = dh is not None, left
        return implementation("norm", dy).norm_backward(dy, dh, None, with_bias, *kept)

    @staticmethod
    def backward(ctx: Any, u: Tensor, v: Tensor, w: Tensor | None) -> Any:
        # With P g = r (g − x̂ mean(g ∘ x̂) − mean(g)), which is symmetric:
        #   cot dy = (P u) ∘ γ + v ∘ x̂ + w;   cot γ = Σ_t (P u) ∘ dy;   cot dh = u
        #   cot x  = P (v ∘ dy − r mean(g ∘ x̂) u − r mean(u ∘ x̂) g) − r x̂ mean(u ∘ dx),
        # where dx is without dh
        forbid_higher_order("norm", "twice")
        passes = implementation("norm", u)
        cot_dy, cot_x, cot_weight = passes.norm_double_backward(u, v, w, *ctx.saved_tensors)
        ctx.left.put(cot_x)
        cot_dh = u if ctx.adds_dh else None
        return cot_dy, cot_dh, None, None, None, None, cot_weight, None, None
