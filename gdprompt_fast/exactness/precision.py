"""What bf16 makes of the meta-gradient."""

from __future__ import annotations

import torch
from torch import nn

from .engine import meta_gradient
from .gradient import EngineGradients
from .objective import StepArguments
from .report import Precision
from .weights import Vector, copied, cosine, norm


def bf16_precision(model: nn.Module, step: StepArguments, exact: EngineGradients) -> Precision:
    """The meta-gradient as bf16 training computes it: under autocast beside fp32 weights, or in the
    bf16 that the weights are in already.
    """
    device = step.batch.context_ids.device.type
    in_bf16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
    with (
        copied(model, None if in_bf16 else torch.float32),
        torch.autocast(device, torch.bfloat16, enabled=not in_bf16),
    ):
        _, whole = meta_gradient(model, step)
        _, first_order = meta_gradient(model, step, first_order=True)
    rounded = EngineGradients(whole, first_order)
    return Precision(
        gradient=_compared(rounded.whole, exact.whole),
        second_order=_compared(rounded.second_order, exact.second_order),
        first_order=_compared(exact.first_order, exact.whole),
    )


def _compared(got: Vector, exact: Vector) -> tuple[float, float]:
    """The cosine, and the ratio of norms."""
    length = norm(exact)
    return cosine(got, exact), norm(got) / length if length > 0 else 0.0
