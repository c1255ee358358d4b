"""The numbers of a step, read without making the device wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..meta.failures import found_at_once

Numbers = dict[str, float]


class _OnTheirWay(NamedTuple):
    """The numbers of a step; those that come from the device are on their way."""

    known: Mapping[str, float | Tensor]
    names: list[str]
    coming: Tensor
    arrived: torch.cuda.Event | None
    use: Callable[[Numbers], None]

    def read(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()
        came = dict(zip(self.names, self.coming.tolist(), strict=True))
        self.use({name: came.get(name, value) for name, value in self.known.items()})


class LateNumbers:
    """Numbers that are read in order: on a CPU at once, on a GPU when the next are there, so that
    it has the next step to do meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most_waiting = 0 if found_at_once(device) else 1
        self._waiting: deque[_OnTheirWay] = deque()

    def add(self, numbers: Mapping[str, float | Tensor], use: Callable[[Numbers], None]) -> None:
        """Has ``use`` called with the numbers, tensors [] among them as numbers, once they are
        there; and reads those before them.
        """
        tensors = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
        together = torch.stack([tensor.detach().double() for tensor in tensors.values()])
        coming = together.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event() if self._device.type == "cuda" else None
        if arrived is not None:
            arrived.record()
        self._waiting.append(_OnTheirWay(numbers, list(tensors), coming, arrived, use))
        while len(self._waiting) > self._most_waiting:
            self._waiting.popleft().read()

    def read_all(self) -> None:
        """Waits for all of them."""
        while self._waiting:
            self._waiting.popleft().read()
