"""An endless shuffled stream of example indices that can be put back to any position."""

from __future__ import annotations

import random


class ShuffledSampler:
    """Goes through all indices in a new seeded order every epoch, without end.

    The order of an epoch follows from the seed and the epoch's number alone, so the number of
    indices drawn, ``position``, is the whole state. A batch may take the end of one epoch and the
    beginning of the next.
    """

    def __init__(self, size: int, seed: int, position: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1 example, got {size}")
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
