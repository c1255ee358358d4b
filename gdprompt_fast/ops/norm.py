"""RMSNorm and LayerNorm with a weight and bias of their own for every row of the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from .backend import implementation
from .guard import forbid_higher_order

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
    return _Norm.apply(x, weight_BD, bias_BD, eps, center)


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
    return _AddNorm.apply(x, residual, weight_BD, bias_BD, eps, center)


class _Norm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
    ) -> Tensor:
        y, mean, rstd = implementation("norm", x).norm_forward(x, weight, bias, eps, center)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.with_bias = bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx, dweight, dbias = _NormBackward.apply(dy, None, ctx.with_bias, *ctx.saved_tensors)
        return dx, dweight, dbias, None, None


class _AddNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, *options: *Options) -> tuple[Tensor, Tensor]:
        weight, bias, *_ = options
        h, y, mean, rstd = implementation("norm", x).add_norm_forward(x, residual, *options)
        ctx.save_for_backward(h, weight, mean, rstd)
        ctx.with_bias = bias is not None
        ctx.set_materialize_grads(False)
        return h, y

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dy: Tensor | None) -> Any:
        if dy is None:
            return dh, dh, None, None, None, None
        dx, dweight, dbias = _NormBackward.apply(dy, dh, ctx.with_bias, *ctx.saved_tensors)
        return dx, dx, dweight, dbias, None, None


class _NormBackward(Function):
    # dx = r (g − x̂ mean(g ∘ x̂) − mean(g)) + dh, g = dy ∘ γ;  dγ = Σ_t dy ∘ x̂;  dβ = Σ_t dy
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, dh: Tensor | None, with_bias: bool, *kept: *Kept
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(dy, *kept)
        ctx.adds_dh = dh is not None
        return implementation("norm", dy).norm_backward(dy, dh, with_bias, *kept)

    @staticmethod
    def backward(ctx: Any, u: Tensor, v: Tensor, w: Tensor | None) -> Any:
        # With P g = r (g − x̂ mean(g ∘ x̂) − mean(g)), which is symmetric:
        #   cot dy = (P u) ∘ γ + v ∘ x̂ + w;   cot γ = Σ_t (P u) ∘ dy;   cot dh = u
        #   cot x  = P (v ∘ dy − r mean(g ∘ x̂) u − r mean(u ∘ x̂) g) − r x̂ mean(u ∘ dx),
        # where dx is without dh
        forbid_higher_order("norm", "twice")
        saved = ctx.saved_tensors
        cot_dy, *cotangents = implementation("norm", u).norm_double_backward(u, v, w, *saved)
        return cot_dy, u if ctx.adds_dh else None, None, *cotangents, None, None
