"""An endless shuffled stream of indices that can be put back to any position, and what is drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import UserError
from .tokenise import Example


def units_by_context(examples: Sequence[Example], queries_per_context: int) -> list[list[int]]:
    """The indices of all examples in units with one context each, to be drawn together.

    Examples with the same context tokens, the same of which count, go in order into units of at
    most ``queries_per_context``; with 1, every example is a unit of its own.
    """
    units: list[list[int]] = []
    newest: dict[Any, list[int]] = {}  # the unit of a context that takes the next example
    for index, example in enumerate(examples):
        key = example.context.tobytes(), example.context_loss
        if key not in newest or len(newest[key]) == queries_per_context:
            newest[key] = []
            units.append(newest[key])
        newest[key].append(index)
    return units


class Sampler(Protocol):
    """An endless stream of indices; the number of those drawn is its whole state."""

    position: int

    def take(self, count: int) -> list[int]: ...


class ShuffledSampler:
    """Goes through all indices in a new seeded order every epoch, without end.

    The order of an epoch follows from the seed and the epoch's number alone, so the number of
    indices drawn, ``position``, is the whole state. A batch may take the end of one epoch and the
    beginning of the next.
    """

    def __init__(self, size: int, seed: int | str, position: int = 0) -> None:
        if size < 1:
            raise UserError(f"size: expected at least 1 example, got {size}")
        self.size = size
        self.seed = seed
        self.position = position
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def take(self, count: int) -> list[int]:
        """The next ``count`` indices."""
        taken: list[int] = []
        while len(taken) < count:
            epoch, offset = divmod(self.position, self.size)
            part = self._order(epoch)[offset : offset + count - len(taken)]
            taken += part
            self.position += len(part)
        return taken

    def _order(self, epoch: int) -> list[int]:
        if self._shuffled[0] != epoch:
            order = list(range(self.size))
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            self._shuffled = (epoch, order)
        return self._shuffled[1]
