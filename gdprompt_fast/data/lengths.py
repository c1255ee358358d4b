"""Batches of about equal lengths, in which little is padding."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import UserError
from ..layout import rung
from .sampler import ShuffledSampler
from .tokenise import Example

POOL_BATCHES = 50  # that are sorted together
NEAR = 2  # batches away


class Size(NamedTuple):
    """What padding and repetition go by.

    Attributes:
        long, short: the lengths of its longer and its shorter row.
        passages: those that it is about.
    """

    long: int
    short: int
    passages: frozenset[bytes] = frozenset()


def step_sizes(units: Sequence[Sequence[Example]]) -> list[Size]:
    """Sizes in a meta step: of the context, and of the longest query row of each unit."""
    return [
        Size(
            len(unit[0].context),
            max(len(each.query) + len(each.response) for each in unit),
            frozenset([unit[0].context.tobytes()]),
        )
        for unit in units
    ]


def prompt_sizes(examples: Sequence[Example]) -> list[Size]:
    """Sizes in fine-tuning: of the prompt row and of the query row."""
    return [
        Size(
            len(each.prompt) + len(each.response),
            len(each.query) + len(each.response),
            frozenset([each.context.tobytes()]),
        )
        for each in examples
    ]


def by_length(sizes: Sequence[Size]) -> list[int]:
    """Indices in an order whose neighbours are of about equal lengths.

    The longer row goes by the ladder of sizes that steps are padded to, the shorter one up and down
    in turns within it: it varies by chance, and would double the padding.
    """
    rungs: dict[int, list[int]] = defaultdict(list)
    for index, size in enumerate(sizes):
        rungs[rung(size.long)].append(index)
    order: list[int] = []
    for number, of_rung in enumerate(sorted(rungs)):
        order += sorted(
            rungs[of_rung],
            key=lambda index: (sizes[index].short, sizes[index].long),
            reverse=number % 2 == 1,
        )
    return order


def cut(order: Sequence[int], sizes: Sequence[Size], size: int) -> list[list[int]]:
    """The indices, in this order as far as may be, in lists of ``size`` without a passage twice.

    What would repeat a passage changes places with what is near and least lengthens rows. Only
    where a passage comes more often than there are lists is it in one twice.
    """
    lists = [list(order[start : start + size]) for start in range(0, len(order), size)]
    for number, chosen in enumerate(lists):
        for place in range(1, size):
            if not _fits(chosen[place], chosen[:place], sizes):
                _exchange(lists, number, place, sizes)
    return lists


def _exchange(lists: list[list[int]], number: int, place: int, sizes: Sequence[Size]) -> None:
    """Changes the place of an index with the best other one, in as near a list as can be."""
    mine = lists[number]
    rest = mine[:place] + mine[place + 1 :]
    for reach in (NEAR, len(lists)):
        best: tuple[int, int, int] | None = None
        for other in range(max(0, number - reach), min(len(lists), number + reach + 1)):
            theirs = lists[other]
            for there, candidate in enumerate(theirs):
                others = theirs[:there] + theirs[there + 1 :]
                fit = _fits(candidate, rest, sizes) and _fits(mine[place], others, sizes)
                if other != number and fit:
                    cost = _area([*rest, candidate], sizes) + _area([*others, mine[place]], sizes)
                    cost -= _area(theirs, sizes)
                    best = min(best or (cost, other, there), (cost, other, there))
        if best is not None:
            _, other, there = best
            mine[place], lists[other][there] = lists[other][there], mine[place]
            return


def _fits(index: int, chosen: Sequence[int], sizes: Sequence[Size]) -> bool:
    return all(sizes[index].passages.isdisjoint(sizes[other].passages) for other in chosen)


def _area(chosen: Sequence[int], sizes: Sequence[Size]) -> int:
    """The positions of their rows, padded."""
    longest = max(sizes[index].long for index in chosen)
    return len(chosen) * (rung(longest) + rung(max(sizes[index].short for index in chosen)))


class LengthSampler:
    """Batches of about equal lengths, as :class:`ShuffledSampler` draws without regard to them.

    The batches of an epoch are drawn in pools of at most ``POOL_BATCHES``. A pool takes the next
    indices of the shuffled stream, makes groups of them at random, sorts these by length, cuts them
    into batches, and gives those in random order. All of it follows from the seed and the place of
    the pool in the stream, so ``position`` is the whole state here too.

    Args:
        sizes: of every index.
        batch: indices in a batch.
        group: so many neighbours in a batch are a group that is left to chance.
    """

    def __init__(
        self, sizes: Sequence[Size], seed: int | str, batch: int, group: int = 1, position: int = 0
    ) -> None:
        self._sizes, self._seed, self._batch, self._group = sizes, seed, batch, group
        self._stream = ShuffledSampler(len(sizes), seed)
        self._pool: tuple[int, list[list[int]]] = (-1, [])
        self.position = position

    def take(self, count: int) -> list[int]:
        """The next batch, of ``count`` indices."""
        if count != self._batch:
            raise UserError(f"count: expected a batch of {self._batch}, got {count}")
        number = self.position // self._batch
        first, batches = self._pool_bounds(number)
        if self._pool[0] != first:
            self._pool = first, self._draw(first, batches)
        self.position += self._batch
        return self._pool[1][number - first]

    def _pool_bounds(self, number: int) -> tuple[int, int]:
        """The first batch of the pool that batch ``number`` is in, and how many it has: equal
        parts, nearly, of the batches that begin in one epoch.
        """
        size, batch = len(self._sizes), self._batch
        epoch = number * batch // size
        begin, end = (-(-at * size // batch) for at in (epoch, epoch + 1))
        pools = -(-(end - begin) // POOL_BATCHES)
        bounds = [begin + (end - begin) * pool // pools for pool in range(pools + 1)]
        first = max(bound for bound in bounds if bound <= number)
        return first, bounds[bounds.index(first) + 1] - first

    def _draw(self, first: int, batches: int) -> list[list[int]]:
        self._stream.position = first * self._batch
        drawn = self._stream.take(batches * self._batch)
        of_drawn = [self._sizes[index] for index in drawn]
        groups = cut(range(len(drawn)), of_drawn, self._group)
        of_groups = [_together([of_drawn[place] for place in group]) for group in groups]
        pool = cut(by_length(of_groups), of_groups, self._batch // self._group)
        random.Random(f"{self._seed} pool {first}").shuffle(pool)
        return [[drawn[place] for group in batch for place in groups[group]] for batch in pool]


def _together(group: Sequence[Size]) -> Size:
    """The size of several, padded to the longest."""
    return Size(
        max(size.long for size in group),
        max(size.short for size in group),
        frozenset().union(*(size.passages for size in group)),
    )
