"""Directional derivatives of a function that is known only with rounding noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

RATIO = 2.5  # between one step size and the next smaller
MOST = 7  # step sizes
NOISE_POINTS = 7

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
    disagreement with its neighbours plus noise / ε is least.

    Args:
        noise: the standard deviation of the rounding of f.
        enough: stop at this uncertainty.

    Raises:
        FloatingPointError: if f is finite at no step size.
    """
    before: list[float] = []
    best: Derivative | None = None
    for index in range(MOST):
        step = first_step / RATIO**index
        row = [(f(step) - f(-step)) / (2 * step)]
        if not math.isfinite(row[0]):
            before = []
            continue
        entries = []
        for order, last in enumerate(before, 1):
            factor = RATIO ** (2 * order)
            row.append((factor * row[-1] - last) / (factor - 1))
            disagreement = max(abs(row[-1] - row[-2]), abs(row[-1] - last))
            entries.append(Derivative(row[-1], disagreement + noise / step, step))
        before = row
        if not entries:
            continue
        found = min(entries, key=lambda entry: entry.uncertainty)
        if best is None or found.uncertainty < best.uncertainty:
            best = found
        noise_has_taken_over = noise / step > 2 * best.uncertainty
        if best.uncertainty <= enough or noise_has_taken_over:
            break
    if best is None:
        raise FloatingPointError("objective: expected finite values near the weights, got none")
    return best


def rounding_noise(f: Function, step: float) -> float:
    """The standard deviation of the rounding of f near 0 (ECnoise of Moré and Wild).

    Third differences of values at neighbouring points: what is smooth in f cancels, and
    independent noise of deviation σ leaves one of σ √20.
    """
    values = [f(step * index) for index in range(NOISE_POINTS)]
    for _ in range(3):
        values = [after - value for value, after in pairwise(values)]
    return math.sqrt(math.fsum(value**2 for value in values) / len(values) / 20)
