"""Adam's rate over a training."""

from __future__ import annotations

import math


def warmup_then_cosine(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Adam's rate at ``step``, counted from 0: a linear warm-up, then a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
