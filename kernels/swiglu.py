"""silu(gate) ∘ up: the three passes of ops/swiglu.py, elementwise over flattened tensors."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .elementwise import flat, launch, load, store


@triton.jit
def _silu(gate):
    # σ(gate), silu and silu'
    s = 1.0 / (1.0 + tl.exp(-gate))
    value = gate * s
    return s, value, s + value * (1.0 - s)


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
    gate = load(gate_ptr, at, live)
    up = load(up_ptr, at, live)
    y = gate / (1.0 + tl.exp(-gate)) * up
    store(y_ptr, at, live, y)


@triton.jit
def _swiglu_backward_kernel(
    dy_ptr,  # [n] in
    gate_ptr,  # [n] in
    up_ptr,  # [n] in
    dgate_ptr,  # [n] out, gate's dtype; added to, if ADD
    dup_ptr,  # [n] out, gate's dtype; added to, if ADD
    n,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    # dgate = dy up silu'(gate);  dup = dy silu(gate)
    at, live = flat(n, BLOCK)
    dy = load(dy_ptr, at, live)
    gate = load(gate_ptr, at, live)
    up = load(up_ptr, at, live)
    _, value, first = _silu(gate)
    dgate, dup = dy * up * first, dy * value
    if ADD:
        dgate += load(dgate_ptr, at, live)
        dup += load(dup_ptr, at, live)
    store(dgate_ptr, at, live, dgate)
    store(dup_ptr, at, live, dup)


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
    a = load(a_ptr, at, live)
    b = load(b_ptr, at, live)
    dy = load(dy_ptr, at, live)
    gate = load(gate_ptr, at, live)
    up = load(up_ptr, at, live)
    s, value, first = _silu(gate)
    second = s * (1.0 - s) * (2.0 + gate * (1.0 - 2.0 * s))
    cot_dy = a * up * first + b * value
    cot_gate = dy * (a * up * second + b * first)
    cot_up = a * dy * first
    store(cot_dy_ptr, at, live, cot_dy)
    store(cot_gate_ptr, at, live, cot_gate)
    store(cot_up_ptr, at, live, cot_up)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) ∘ up."""
    (y,) = launch(_swiglu_forward_kernel, 1, gate, up, like=gate)
    return y


def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, into: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """dgate = dy ∘ up ∘ silu'(gate) and dup = dy ∘ silu(gate), added to the two ``into``, dense
    ones, if given.
    """
    add = into is not None
    return launch(_swiglu_backward_kernel, 2, dy, gate, up, like=gate, into=into, ADD=add)


def swiglu_double_backward(
    a: Tensor, b: Tensor, dy: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of dy, gate and up from those of dgate (a) and dup (b)."""
    cot_dy, cot_gate, cot_up = launch(
        _swiglu_double_backward_kernel, 3, a, b, dy, gate, up, like=gate
    )
    return cot_dy, cot_gate, cot_up
