"""Numbers whose uncertainty is that over seeds: intervals and tests by Student's t, and how many
seeds show an effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from .cells import Cell, Estimate
from .findings import Finding

CONFIDENCE = 0.95
LEVEL = 0.05  # of one-sided tests
POWER = 0.9
FEWEST = 2  # seeds that have a spread
EQUAL_WITHIN = 1e-12  # of differences that only rounding tells apart


class OverSeeds(Cell):
    """Scores whose every seed is one observation, whatever the number of its examples."""

    @property
    def se(self) -> float:
        """The standard error over seeds; NaN of a single one."""
        return _standard_error(self.per_seed)

    @property
    def estimate(self) -> Estimate:
        """The mean, its standard error, and half its interval."""
        return estimate(self.per_seed)

    def differences(self, other: Cell) -> list[float]:
        """Of the means, seed by seed."""
        return [a - b for a, b in zip(self.per_seed, other.per_seed, strict=True)]


@dataclass(frozen=True)
class NamedSeeds:
    """A number over seeds and what it is of.

    Attributes:
        share: whether it is a share, told in %.
    """

    name: str
    cell: OverSeeds
    share: bool = True

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.cell.estimate, self.share)}{' %' * self.share}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed, with its standard error and half its 95 % interval."""
    se = _standard_error(values)
    half = math.nan
    if len(values) >= FEWEST:
        half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * se
    return Estimate(fmean(values), se, half)


def larger_over_seeds(claim: str, where: str, high: NamedSeeds, low: NamedSeeds) -> Finding:
    """Shows if ``high`` is above ``low`` by the one-sided t-test of the seeds' differences, at the
    level 0.05; of a single seed, or of equal differences, nothing shows. It is said where the
    two-sided interval has zero in it all the same.
    """
    differences = high.cell.differences(low.cell)
    p = one_sided_p(differences)
    difference = estimate(differences)
    has_zero = p < LEVEL and difference.value <= half_of(difference)
    return Finding(
        claim,
        where,
        p < LEVEL,
        f"{high}, {low}; difference {_shown(difference, high.share, '+')}"
        f"{' points' * high.share}, "
        f"{len(differences)} {'seed' if len(differences) == 1 else 'seeds'}, one-sided p {_p(p)}"
        f"{'; the 95 % interval includes 0' * has_zero}.",
        (difference,),
    )


def none_over_seeds(
    claim: str,
    where: str,
    one: NamedSeeds,
    other: NamedSeeds,
    margin: float,
    controls: Sequence[tuple[NamedSeeds, NamedSeeds]],
) -> Finding:
    """Shows if the 95 % interval of the difference is within ± ``margin`` and something was learnt.

    Args:
        controls: pairs of which one at least has to have its first above its second, by the test of
            :func:`larger_over_seeds`: where nothing is learnt there is no difference either.
    """
    difference = estimate(one.cell.differences(other.cell))
    learnt = [pair for pair in controls if _is_above(*pair)]
    control = "nothing was learnt"
    if learnt:
        control = "learnt: {} above {}".format(*learnt[0])
    return Finding(
        claim,
        where,
        bool(learnt) and abs(difference.value) + half_of(difference) <= margin,
        f"{one}, {other}; difference {_shown(difference, True, '+')} points, "
        f"none if its interval is within ± {100 * margin:g}; {control}.",
        (difference,),
    )


def _is_above(high: NamedSeeds, low: NamedSeeds) -> bool:
    return one_sided_p(high.cell.differences(low.cell)) < LEVEL


def half_of(number: Estimate) -> float:
    """Half of an interval; NaN, which nothing is within, where it is not known."""
    return math.nan if number.half_interval is None else number.half_interval


def one_sided_p(differences: Sequence[float]) -> float:
    """P(T ≥ t) for the mean of the differences over its standard error; NaN of a single one, and of
    equal ones, whose spread says nothing of the next seed's.
    """
    if len(differences) < FEWEST or max(differences) - min(differences) < EQUAL_WITHIN:
        return math.nan
    mean, se = fmean(differences), _standard_error(differences)
    return 1 - t_cdf(mean / se, len(differences) - 1)


def seeds_needed(differences: Sequence[float], power: float = POWER) -> int | None:
    """How many seeds the one-sided test at the level 0.05 needs to show an effect of the size found
    with this probability: ((z_0.95 + z_power) sd / mean)² + z_0.95² / 2, the normal approximation
    with its correction for a t-test, and at least two. None if there is no effect to be shown.
    """
    mean = fmean(differences)
    if mean <= 0 or len(differences) < FEWEST:
        return None
    z, z_power = (NormalDist().inv_cdf(each) for each in (1 - LEVEL, power))
    return max(FEWEST, math.ceil(((z + z_power) * stdev(differences) / mean) ** 2 + z * z / 2))


def t_cdf(t: float, freedom: int) -> float:
    """P(T ≤ t) of Student's distribution with a whole number of degrees of freedom: the finite sums
    of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cos2 = math.cos(angle) ** 2
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 if odd else 1, freedom - 1, 2):
        term *= k / (k + 1) * cos2
        total += term
    if freedom == 1:
        total = 0.0
    inside = math.sin(angle) * total
    inside = 2 / math.pi * (angle + inside) if odd else inside
    return 0.5 + inside / 2


def t_quantile(share: float, freedom: int) -> float:
    """The t with P(T ≤ t) = ``share``, of at least a half, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < share else (low, middle)
    return high


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) >= FEWEST else math.nan


def _shown(number: Estimate, share: bool, sign: str = "") -> str:
    half = half_of(number)
    scale, digits = (100, 1) if share else (1, 3)
    return f"{scale * number.value:{sign}.{digits}f} ± {scale * half:.{digits}f}"


def _p(p: float) -> str:
    if math.isnan(p):
        return "unknown"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
