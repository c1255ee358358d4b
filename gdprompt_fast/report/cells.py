"""A measured number: a score of every example, for every seed, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error.

    Attributes:
        half_interval: half of its 95 % interval; None where the standard error is what is told.
    """

    value: float
    se: float
    half_interval: float | None = None


@dataclass(frozen=True)
class Cell:
    """The scores of one model in one setting.

    Attributes:
        values: a score per example, for every seed.
        group: as many consecutive examples share one θ'; their scores are not independent, so the
            standard error is that of the means of groups.
    """

    values: tuple[tuple[float, ...], ...]
    group: int = 1

    @property
    def per_seed(self) -> list[float]:
        """The mean over the examples, for every seed."""
        return [fmean(values) for values in self.values]

    @property
    def of_each_seed(self) -> list[float]:
        """The number of every seed by itself; NaN where it has none."""
        return self.per_seed

    @property
    def mean(self) -> float:
        """The mean of the seeds' means."""
        return fmean(self.per_seed)

    @property
    def examples(self) -> int:
        """The number of examples, over all seeds."""
        return sum(map(len, self.values))

    @property
    def se(self) -> float:
        """The standard error of the mean: the larger of what the examples and what the seeds say.

        That over seeds has all that varies in it, but of few seeds it is itself uncertain; that
        over examples is a floor. NaN where a seed has a single example or group.
        """
        errors = [_standard_error(_group_means(values, self.group)) for values in self.values]
        over_examples = math.hypot(*errors) / len(errors)
        if len(self.values) == 1:
            return over_examples
        return max(over_examples, _standard_error(self.per_seed))

    @property
    def estimate(self) -> Estimate:
        """The mean and its standard error."""
        return Estimate(self.mean, self.se)

    def first(self, counts: Sequence[int]) -> Cell:
        """The same of so many first examples of every seed."""
        of_seeds = zip(self.values, counts, strict=True)
        return replace(self, values=tuple(values[:count] for values, count in of_seeds))

    def minus(self, other: Cell) -> Estimate:
        """The difference of two means, with the standard error of the difference.

        Cells with the same number of examples for every seed are taken to be about the same
        examples, in the same order, and are compared example by example.
        """
        if list(map(len, self.values)) != list(map(len, other.values)):
            return self.minus_independent(other)
        return Cell(
            tuple(
                tuple(a - b for a, b in zip(ours, theirs, strict=True))
                for ours, theirs in zip(self.values, other.values, strict=True)
            ),
            max(self.group, other.group),
        ).estimate

    def minus_independent(self, other: Cell) -> Estimate:
        """The difference of two means over examples that have nothing to do with each other."""
        return Estimate(self.mean - other.mean, math.hypot(self.se, other.se))


def _group_means(values: Sequence[float], group: int) -> list[float]:
    starts = range(0, len(values), group)
    return [fmean(values[start : start + group]) for start in starts]


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2 or any(map(math.isnan, values)):
        return math.nan
    return stdev(values) / math.sqrt(len(values))
