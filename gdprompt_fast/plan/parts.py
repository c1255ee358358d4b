"""What the bytes that a step allocates belong to."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

from torch import Tensor

from ..models.memory import PeakMemory
from .shapes import DEVICE_OF, NeverCompiled
from .timeline import Timeline

LOSS_TILES = "loss tiles"


class PeakParts(NeverCompiled, PeakMemory):
    """Counts as :class:`PeakMemory` does, and says to which part every byte belongs.

    A storage belongs to the part whose name stood in ``part`` when it was made, or to the loss
    tiles if the passes over the vocabulary made it, until :meth:`mark` says otherwise.

    Args:
        part: the first part that storages are made in.
        present: tensors alive before, by part.
    """

    def __init__(self, part: str, present: dict[str, Iterable[Tensor]]) -> None:
        self.part = part
        self._number: dict[int, int] = {}  # of the live storages
        self._parts: list[str] = []
        self._bytes: list[int] = []
        self._births_and_deaths: list[int] = []  # a number, or its complement
        super().__init__()
        for name, tensors in present.items():
            self.mark(name, tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF:
            return args[0].fake_device
        return super().__torch_dispatch__(func, types, args, kwargs)

    def mark(self, part: str, tensors: Iterable[Tensor]) -> None:
        """The storages of these tensors belong to ``part``, and did from the start."""
        for tensor in tensors:
            self._see(tensor)
            self._parts[self._number[tensor.untyped_storage()._cdata]] = part

    def timeline(self) -> Timeline:
        """What was allocated and freed, by the parts as they are marked now."""
        return Timeline.of(
            (self._parts[n], self._bytes[n]) if n >= 0 else (self._parts[~n], -self._bytes[~n])
            for n in self._births_and_deaths
        )

    def _see(self, tensor: Tensor) -> bool:
        is_new = super()._see(tensor)
        if is_new:
            storage = tensor.untyped_storage()
            number = self._number[storage._cdata] = len(self._parts)
            self._parts.append(LOSS_TILES if _in_a_loss(sys._getframe(1)) else self.part)
            self._bytes.append(storage.nbytes())
            self._births_and_deaths.append(number)
        return is_new

    def _free(self, key: int) -> None:
        super()._free(key)
        self._births_and_deaths.append(~self._number.pop(key))


def _in_a_loss(frame: FrameType | None) -> bool:
    """Whether the innermost code of the engine is that of the passes over the vocabulary."""
    while frame is not None:
        module: str = frame.f_globals.get("__name__", "")
        if module.startswith(
            ("gdprompt_fast.ops.", "gdprompt_fast.update.", "gdprompt_fast.meta.")
        ):
            return ".vocabulary" in module and not module.endswith(".functions")
        frame = frame.f_back
    return False
