"""One run after another in which one thing is varied, by strong internalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..report.findings import Finding
from ..report.outcome import Chart, Outcome
from ..report.over_seeds import NamedSeeds, OverSeeds, larger_over_seeds
from .measured import PAPER, STRONG, WEAK, Scores, gaps, named_pairs, none, power_notes
from .stages import NEVER_SEEN

COLUMN = "difference"


def varied(
    title: str,
    rows: Mapping[str, Scores],
    findings: Sequence[Finding],
    notes: Sequence[str],
    along: tuple[str, Sequence[float]] | None = None,
) -> Outcome:
    """Both differences for every row, and how they go along a number if that is what is varied.

    Args:
        along: what the number is, and its value in every row.
    """
    pairs = {"weak": WEAK, "strong": STRONG}
    tables = [gaps(f"Exact match, {k} internalisation", COLUMN, p, rows) for k, p in pairs.items()]
    charts = (
        [] if along is None else [_chart(kind, pair, rows, *along) for kind, pair in pairs.items()]
    )
    power = power_notes({f"strong, {head}": each.gap(STRONG) for head, each in rows.items()})
    return Outcome(
        title,
        tables,
        findings,
        [*notes, *power],
        charts=charts,
        paper=PAPER,
        over_seeds=True,
    )


def grows(claim: str, where: str, rows: Mapping[str, Scores], high: str, low: str) -> list[Finding]:
    """Whether strong internalisation is larger in one row than in another."""
    pair = [NamedSeeds(f"difference at {head}", _gap(rows[head])) for head in (high, low)]
    return [larger_over_seeds(claim, where, *pair)] if high != low else []


def vanishes(
    claim: str,
    where: str,
    rows: Mapping[str, Scores],
    head: str,
    pair: tuple[str, str] = STRONG,
) -> list[Finding]:
    """Whether a row has no strong internalisation, though D5 is above what is never seen, or
    another row has it; nothing where the tests are not there.
    """
    scores = rows[head]
    controls = named_pairs(scores, (STRONG[0], NEVER_SEEN))
    for name, other in rows.items():
        if name != head:
            controls += named_pairs(other, pair, f", {name}")
    return none(claim, where, scores, pair, controls)


def _gap(scores: Scores) -> OverSeeds:
    cell = scores.gap(STRONG)
    assert cell is not None
    return cell


def _chart(
    kind: str, pair: tuple[str, str], rows: Mapping[str, Scores], name: str, at: Sequence[float]
) -> Chart:
    points = []
    for x, scores in zip(at, rows.values(), strict=True):
        gap = scores.gap(pair)
        if gap is not None:
            points.append((x, gap.estimate))
    lines = {f"{kind} internalisation": points}
    log = min(at) > 0 and max(at) / min(at) > 8
    return Chart(f"{kind} internalisation", name, "difference of exact match", lines, log)
