"""Adam's rate over a training, and its step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


def warmup_then_cosine(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Adam's rate at ``step``, counted from 0: a linear warm-up, then a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def clipped_update(
    optimizer: torch.optim.Optimizer,
    trained: Sequence[nn.Parameter],
    rate: float,
    clip_norm: float,
    step: int,
    what: str = "meta-gradient",
) -> float:
    """An update at ``rate`` by ``.grad``, which it clips and clears; the norm before that.

    Raises:
        FloatingPointError: if the norm is not finite, naming ``what``; the weights are untouched.
    """
    norm = float(torch.nn.utils.clip_grad_norm_(trained, clip_norm))
    if not math.isfinite(norm):
        raise FloatingPointError(f"{what}: its norm is {norm} at step {step}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return norm
