"""What the tests of captured steps do again and again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gdprompt_fast import MetaBatch, MetaStepOutput, fast_meta_step


def gradients(model: nn.Module) -> list[Tensor | None]:
    """The gradients, which are None afterwards."""
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    """To the bit."""
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def gold_step(model: nn.Module, batch: MetaBatch, **options: Any) -> MetaStepOutput:
    return fast_meta_step(model, batch, objective="gold", inner_lr=0.1, **options)


def recorded(model: nn.Module, batch: MetaBatch) -> None:
    """Two steps, after which the next is a replay."""
    for _ in range(2):
        out = gold_step(model, batch)
        model.zero_grad()
    assert out.captured, out.eager
