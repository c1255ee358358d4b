"""silu(gate) ∘ up: the three passes."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) ∘ up."""
    y: Tensor = torch.ops.aten.silu(gate).mul_(up)  # F.silu may be another by now
    return y


def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, into: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """dgate = dy ∘ up ∘ silu'(gate) and dup = dy ∘ silu(gate), added to the two ``into`` if
    given.
    """
    dgate = torch.ops.aten.silu_backward(dy, gate).mul_(up)
    dup = torch.ops.aten.silu(gate).mul_(dy)
    return (dgate, dup) if into is None else (into[0].add_(dgate), into[1].add_(dup))


def swiglu_double_backward(
    a: Tensor, b: Tensor, dy: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of dy, gate and up from those of dgate (a) and dup (b)."""
    s = torch.sigmoid(gate)
    value = gate * s
    first = s + value * (1 - s)
    second = s * (1 - s) * (2 + gate * (1 - 2 * s))
    a_first = a * first
    cot_dy = (a_first * up).addcmul_(b, value)
    cot_up = a_first.mul_(dy)
    cot_gate = second.mul_(a).mul_(up).addcmul_(b, first).mul_(dy)
    return cot_dy, cot_gate, cot_up
