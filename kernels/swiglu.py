"""silu(gate) ∘ up: the three passes of ops/swiglu.py, elementwise over flattened tensors."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .elementwise import flat, launch


@triton.jit
def _swiglu_forward_kernel(
    gate_ptr,  # [n] in
    up_ptr,  # [n] in
    y_ptr,  # [n] out, gate's dtype
    n,
    BLOCK: tl.constexpr,
):
    # y = gate σ(gate) up
    at, live = flat(n, BLOCK)
    gate = tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=live, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _swiglu_backward_kernel(
    dy_ptr,  # [n] in
    gate_ptr,  # [n] in
    up_ptr,  # [n] in
    dgate_ptr,  # [n] out, gate's dtype
    dup_ptr,  # [n] out, gate's dtype
    n,
    BLOCK: tl.constexpr,
):
    # dgate = dy up silu'(gate);  dup = dy silu(gate)
    at, live = flat(n, BLOCK)
    dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=live, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    value = gate * s
    first = s + value * (1.0 - s)
    tl.store(dgate_ptr + at, (dy * up * first).to(dgate_ptr.dtype.element_ty), mask=live)
    tl.store(dup_ptr + at, (dy * value).to(dup_ptr.dtype.element_ty), mask=live)


@triton.jit
def _swiglu_double_backward_kernel(
    a_ptr,  # [n] in, cotangent of dgate
    b_ptr,  # [n] in, cotangent of dup
    dy_ptr,  # [n] in
    gate_ptr,  # [n] in
    up_ptr,  # [n] in
    cot_dy_ptr,  # [n] out, gate's dtype
    cot_gate_ptr,  # [n] out, gate's dtype
    cot_up_ptr,  # [n] out, gate's dtype
    n,
    BLOCK: tl.constexpr,
):
    # cot dy = a up silu' + b silu;  cot gate = dy (a up silu'' + b silu');  cot up = a dy silu'
    at, live = flat(n, BLOCK)
    a = tl.load(a_ptr + at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=live, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=live, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    value = gate * s
    first = s + value * (1.0 - s)
    second = s * (1.0 - s) * (2.0 + gate * (1.0 - 2.0 * s))
    cot_dy = a * up * first + b * value
    cot_gate = dy * (a * up * second + b * first)
    cot_up = a * dy * first
    tl.store(cot_dy_ptr + at, cot_dy.to(cot_dy_ptr.dtype.element_ty), mask=live)
    tl.store(cot_gate_ptr + at, cot_gate.to(cot_gate_ptr.dtype.element_ty), mask=live)
    tl.store(cot_up_ptr + at, cot_up.to(cot_up_ptr.dtype.element_ty), mask=live)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) ∘ up."""
    (y,) = launch(_swiglu_forward_kernel, 1, gate, up, like=gate)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate = dy ∘ up ∘ silu'(gate) and dup = dy ∘ silu(gate)."""
    dgate, dup = launch(_swiglu_backward_kernel, 2, dy, gate, up, like=gate)
    return dgate, dup


def swiglu_double_backward(
    a: Tensor, b: Tensor, dy: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of dy, gate and up from those of dgate (a) and dup (b)."""
    cot_dy, cot_gate, cot_up = launch(
        _swiglu_double_backward_kernel, 3, a, b, dy, gate, up, like=gate
    )
    return cot_dy, cot_gate, cot_up
