"""silu(gate) ∘ up: the three passes."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.gdprompt_fast


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) ∘ up."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _ops.swiglu_forward(gate, up, y)
    return y


def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, into: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """dgate = dy ∘ up ∘ silu'(gate) and dup = dy ∘ silu(gate), added to the two ``into`` if
    given.
    """
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    _ops.swiglu_backward(dy, gate, up, dgate, dup)
    return (dgate, dup) if into is None else (into[0].add_(dgate), into[1].add_(dup))


def swiglu_double_backward(
    a: Tensor, b: Tensor, dy: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of dy, gate and up from those of dgate (a) and dup (b)."""
    a, b, dy, gate, up = (t.contiguous() for t in (a, b, dy, gate, up))
    cot_dy, cot_gate, cot_up = (torch.empty_like(gate) for _ in range(3))
    _ops.swiglu_double_backward(a, b, dy, gate, up, cot_dy, cot_gate, cot_up)
    return cot_dy, cot_gate, cot_up
