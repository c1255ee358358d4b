"""x Φ(x): the three passes of ops/gelu.py, elementwise over flattened tensors."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .elementwise import flat, launch, load, store

K = tl.constexpr(0.7978845608028654)  # √(2/π); the tanh form's u = K (x + C x³)
C = tl.constexpr(0.044715)
ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / √(2π)


@triton.jit
def _cdf(x, TANH: tl.constexpr):
    # Φ(x); or ½ (1 + tanh(u)) = σ(2u), and σ(2u) σ(−2u) without cancellation
    if TANH:
        u = (x + x * x * x * C) * K
        e = tl.exp(-2.0 * tl.abs(u))
        s = 1.0 / (1.0 + e)
        return tl.where(u < 0, e * s, s), e * s * s
    else:
        return 0.5 * (1.0 + tl.erf(x * ROOT_HALF)), 0.0


@triton.jit
def _derivatives(x, TANH: tl.constexpr):
    # gelu' = Φ + x d and gelu'' = 2 d + x d', with d = Φ'
    cdf, slope = _cdf(x, TANH)
    if TANH:
        du = (1.0 + x * x * (3.0 * C)) * (2.0 * K)
        density = slope * du
        d_density = slope * (x * (12.0 * K * C) + (1.0 - 2.0 * cdf) * du * du)
    else:
        density = tl.exp(-0.5 * x * x) * DENSITY_AT_0
        d_density = -x * density
    return cdf + x * density, 2.0 * density + x * d_density


@triton.jit
def _gelu_forward_kernel(
    x_ptr,  # [n] in
    y_ptr,  # [n] out, x's dtype
    n,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # y = x Φ(x)
    at, live = flat(n, BLOCK)
    x = load(x_ptr, at, live)
    cdf, _ = _cdf(x, TANH)
    store(y_ptr, at, live, x * cdf)


@triton.jit
def _gelu_backward_kernel(
    dy_ptr,  # [n] in
    x_ptr,  # [n] in
    dx_ptr,  # [n] out, x's dtype
    n,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # dx = dy gelu'(x)
    at, live = flat(n, BLOCK)
    dy = load(dy_ptr, at, live)
    x = load(x_ptr, at, live)
    first, _ = _derivatives(x, TANH)
    store(dx_ptr, at, live, dy * first)


@triton.jit
def _gelu_double_backward_kernel(
    a_ptr,  # [n] in, cotangent of dx
    dy_ptr,  # [n] in
    x_ptr,  # [n] in
    cot_dy_ptr,  # [n] out, x's dtype
    cot_x_ptr,  # [n] out, x's dtype
    n,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # cot dy = a gelu'(x);  cot x = a dy gelu''(x)
    at, live = flat(n, BLOCK)
    a = load(a_ptr, at, live)
    dy = load(dy_ptr, at, live)
    x = load(x_ptr, at, live)
    first, second = _derivatives(x, TANH)
    store(cot_dy_ptr, at, live, a * first)
    store(cot_x_ptr, at, live, a * dy * second)


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """y = x Φ(x)."""
    (y,) = launch(_gelu_forward_kernel, 1, x, like=x, TANH=approximate == "tanh")
    return y


def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dx = dy ∘ gelu'(x)."""
    (dx,) = launch(_gelu_backward_kernel, 1, dy, x, like=x, TANH=approximate == "tanh")
    return dx


def gelu_double_backward(
    a: Tensor, dy: Tensor, x: Tensor, approximate: str
) -> tuple[Tensor, Tensor]:
    """Cotangents of dy and x from that of dx (a)."""
    cot_dy, cot_x = launch(
        _gelu_double_backward_kernel, 2, a, dy, x, like=x, TANH=approximate == "tanh"
    )
    return cot_dy, cot_x
