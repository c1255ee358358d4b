"""Whether processes have the same weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .group import check_same, world_size

_CHUNK = 1 << 20  # numbers that are in fp64 at a time


def check_same_weights(name: str, model: nn.Module) -> None:
    """That all processes have the same weights, trained and frozen; of sharded ones that was so
    when they were divided.

    Raises:
        UserError: naming the process that has others.
    """
    weights = list(model.parameters())
    if world_size() > 1 and not any(isinstance(each, DTensor) for each in weights):
        check_same(f"{name}: the sum of its weights by their places", _sum_by_place(weights))


def _sum_by_place(weights: Iterable[Tensor]) -> float:
    """In fp64; permuted weights have another one."""
    sums = [
        _weighted(chunk.double())
        for weight in weights
        for chunk in weight.detach().reshape(-1).split(_CHUNK)
    ]
    return float(_weighted(torch.stack(sums)))


def _weighted(numbers: Tensor) -> Tensor:
    places = torch.arange(1, len(numbers) + 1, dtype=torch.float64, device=numbers.device)
    return (numbers * places).sum()
