"""What numbers show or do not show, by rules that were fixed before there were numbers.

A difference counts if it is more than twice its standard error.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cells import Cell, Estimate

STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Named:
    """A measured number and what it is of."""

    name: str
    cell: Cell

    def __str__(self) -> str:
        return f"{self.name} {_percent(self.cell.estimate)}"


@dataclass(frozen=True)
class Finding:
    """A claim of the paper, held against our numbers.

    Attributes:
        claim: in words.
        where: the task or the models it was looked for in.
        shows: whether our numbers bear it out, by the rule of the function that made it.
        because: the numbers, with the difference that decided and its standard error.
        differences: the same, for machines: shares with standard errors.
    """

    claim: str
    where: str
    shows: bool
    because: str
    differences: tuple[Estimate, ...]

    @property
    def verdict(self) -> str:
        """In words."""
        return "shows" if self.shows else "does not show"


def larger(claim: str, where: str, high: Named, low: Named, independent: bool = False) -> Finding:
    """Shows if ``high`` is above ``low`` by more than two standard errors of the difference.

    Args:
        independent: the two are about different examples, though as many.
    """
    difference = (high.cell.minus_independent if independent else high.cell.minus)(low.cell)
    return Finding(
        claim,
        where,
        is_positive(difference),
        f"{high}, {low}; difference {_points(difference)}.",
        (difference,),
    )


def close(claim: str, where: str, one: Named, other: Named, margin: float) -> Finding:
    """Shows if the difference and two standard errors on either side are within ± ``margin``."""
    difference = one.cell.minus(other.cell)
    return Finding(
        claim,
        where,
        abs(difference.value) + STANDARD_ERRORS * difference.se <= margin,
        f"{one}, {other}; difference {_points(difference)}, close if within "
        f"± {100 * margin:g} points with two standard errors.",
        (difference,),
    )


def destroyed(claim: str, where: str, right: Named, wrong: Named, without: Named) -> Finding:
    """Shows if there is a gain from ``without`` to ``right``, and ``wrong`` is below ``right`` and
    not above ``without``, each by two standard errors.
    """
    gain = right.cell.minus(without.cell)
    loss = right.cell.minus(wrong.cell)
    left = wrong.cell.minus(without.cell)
    return Finding(
        claim,
        where,
        is_positive(gain) and is_positive(loss) and not is_positive(left),
        f"{right}, {wrong}, {without}; gain {_points(gain)}, left of it {_points(left)}.",
        (gain, loss, left),
    )


def kept(claim: str, where: str, after: Named, before: Named, margin: float) -> Finding:
    """Shows if ``after`` is below ``before`` by no more than ``margin``, two standard errors of the
    difference included.
    """
    difference = after.cell.minus(before.cell)
    return Finding(
        claim,
        where,
        difference.value - STANDARD_ERRORS * difference.se >= -margin,
        f"{after}, {before}; difference {_points(difference)}, kept if no more than "
        f"{100 * margin:g} points are lost with two standard errors.",
        (difference,),
    )


def forgets_little(where: str, after: Named, before: Named, margin: float) -> Finding:
    """Shows if the NLL of running text, in nats a token, rises by no more than ``margin``, two
    standard errors of the rise included.
    """
    rise = after.cell.minus(before.cell)
    nats = "{}: {:.3f} ± {:.3f}".format
    numbers = ", ".join(nats(each.name, each.cell.mean, each.cell.se) for each in (after, before))
    return Finding(
        "running text is not forgotten",
        where,
        rise.value + STANDARD_ERRORS * rise.se <= margin,
        f"NLL in nats a token, {numbers}; rise {rise.value:+.3f} ± {rise.se:.3f}, little if at "
        f"most {margin:g} with two standard errors.",
        (rise,),
    )


def is_positive(difference: Estimate) -> bool:
    """By more than two standard errors; never where the standard error is not known."""
    return difference.value > STANDARD_ERRORS * difference.se


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} ± {100 * estimate.se:.1f} %"


def _points(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} ± {100 * estimate.se:.1f} points"
