"""Directional derivatives of a function that is known only with rounding noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

RATIO = 2.5  # between one step size and the next smaller
MOST = 7  # step sizes
NOISE_POINTS = 9
TRUSTED = 0.01  # of a correction by extrapolation is doubtful: entries can agree by chance

Function = Callable[[float], float]


@dataclass(frozen=True)
class Derivative:
    """f'(0) and how far off it may be: truncation, seen as the disagreement of step sizes, and
    rounding, the noise of f over the step size.
    """

    value: float
    uncertainty: float
    step: float


def central_difference(f: Function, first_step: float, noise: float, enough: float) -> Derivative:
    """f'(0) by central differences at step sizes from ``first_step`` down, extrapolated (Ridders).

    D(ε) = (f(ε) − f(−ε)) / 2ε = f' + c ε² + …, so neighbours in the tableau agree where ε is small
    enough for the dropped terms and large enough for the noise, and the entry is taken whose
    disagreement with a lower order and a larger step size, and noise / ε, is least.

    Args:
        noise: the standard deviation of the rounding of f.
        enough: stop at this uncertainty.

    Raises:
        FloatingPointError: if f is finite at less than three step sizes in a row.
    """
    before: list[float] = []
    last: Derivative | None = None
    best: Derivative | None = None
    for index in range(MOST):
        step = first_step / RATIO**index
        before = _row((f(step) - f(-step)) / (2 * step), before)
        found = _best_of(before, noise / step, step)
        if found is not None and last is not None:
            moved_by = abs(found.value - last.value)
            sure = replace(found, uncertainty=max(found.uncertainty, moved_by))
            if best is None or sure.uncertainty < best.uncertainty:
                best = sure
            if best.uncertainty <= enough or noise / step > 2 * best.uncertainty:
                break
        last = found
    if best is None:
        raise FloatingPointError("objective: expected finite values near the weights, got none")
    return best


def _row(difference: float, before: list[float]) -> list[float]:
    """The next row of the tableau: order by order, extrapolated with the row before; none after a
    difference that is not finite.
    """
    if not math.isfinite(difference):
        return []
    row = [difference]
    for order, last in enumerate(before, 1):
        factor = RATIO ** (2 * order)
        row.append((factor * row[-1] - last) / (factor - 1))
    return row


def _best_of(row: list[float], noise: float, step: float) -> Derivative | None:
    """The entry that differs least from the one of an order less; None for a row of one."""
    entries = []
    for less, value in pairwise(row):
        disagreement = max(abs(value - less), TRUSTED * abs(value - row[0]))
        entries.append(Derivative(value, disagreement + noise, step))
    return min(entries, key=lambda entry: entry.uncertainty, default=None)


def rounding_noise(f: Function, step: float) -> float:
    """The standard deviation of the rounding of f near 0 (ECnoise of Moré and Wild).

    Third differences of values at neighbouring points: what is smooth in f cancels, and
    independent noise of deviation σ leaves one of σ √20.
    """
    values = [f(step * index) for index in range(NOISE_POINTS)]
    for _ in range(3):
        values = [after - value for value, after in pairwise(values)]
    return math.sqrt(math.fsum(value**2 for value in values) / len(values) / 20)
