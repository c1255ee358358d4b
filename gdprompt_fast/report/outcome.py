"""What an experiment found: numbers in tables, findings, words; and how that becomes JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .cells import Cell, Estimate
from .findings import Finding

PERCENT, NATS = "%", "nats a token"  # units of tables


@dataclass(frozen=True)
class Paper:
    """Whose numbers stand beside ours.

    Attributes:
        source: authors and where to find it.
        model: the model that its numbers are of.
    """

    source: str
    model: str


PROMPTING = Paper(
    "Zhang, Choshen and Andreas, arXiv 2506.20989, as summarised publicly", "Llama 3.2 1B"
)
PaperNumbers = Mapping[tuple[str, str], float | None]


@dataclass(frozen=True)
class Table:
    """Cells by row and column, each a share of examples or a mean score between 0 and 1, or an NLL.

    Attributes:
        title: what is measured, and on what.
        columns: the heads of the columns.
        rows: for every row's head its cells; None where there is nothing to measure.
        paper: the paper's own numbers in %, by the heads of row and column.
        unit: ``PERCENT`` for shares and scores, ``NATS`` for an NLL, or what else numbers are in.
    """

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Cell | None]]
    paper: PaperNumbers = field(default_factory=dict)
    unit: str = PERCENT

    def to_json(self) -> dict[str, Any]:
        """Means and standard errors in the table's unit."""
        rows = [
            {
                "head": head,
                "cells": [
                    None if cell is None else self._cell(cell, head, column)
                    for cell, column in zip(cells, self.columns, strict=True)
                ],
            }
            for head, cells in self.rows.items()
        ]
        head = {"title": self.title, "unit": self.unit, "columns": list(self.columns)}
        return {**head, "rows": rows}

    def _cell(self, cell: Cell, row: str, column: str) -> dict[str, Any]:
        scale = 100 if self.unit == PERCENT else 1
        return {
            "mean": _number(scale * cell.mean),
            **_spread(cell.estimate, scale),
            "examples": cell.examples,
            "per_seed": [_number(scale * own) for own in cell.of_each_seed],
            "paper": self.paper.get((row, column)),
        }


@dataclass(frozen=True)
class Texts:
    """A table of words, such as answers side by side."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """Numbers with standard errors over a number.

    Attributes:
        title: what is drawn.
        x, y: what the axes are.
        lines: by name, the points from left to right.
        log_x: whether ``x`` is drawn by its logarithm.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, Estimate]]]
    log_x: bool = False

    def to_json(self) -> dict[str, Any]:
        """As numbers and names."""
        lines = [
            {
                "head": head,
                "points": [{"x": x, "value": _number(at.value), **_spread(at)} for x, at in points],
            }
            for head, points in self.lines.items()
        ]
        return {"title": self.title, "x": self.x, "y": self.y, "log_x": self.log_x, "lines": lines}


@dataclass(frozen=True)
class Outcome:
    """Everything that an experiment reports.

    Attributes:
        title: of the experiment.
        tables: its numbers; its figure has a panel for each.
        findings: what the numbers show or do not show.
        notes: how to read them.
        texts: tables of words.
        charts: the panels of its figure in the place of its tables, if there are any.
        paper: the one that it repeats.
        over_seeds: every number is of the seeds, ± half of its 95 % interval, and cells are
            :class:`~gdprompt_fast.report.over_seeds.OverSeeds`; else ± a standard error.
    """

    title: str
    tables: Sequence[Table]
    findings: Sequence[Finding]
    notes: Sequence[str]
    texts: Sequence[Texts] = ()
    charts: Sequence[Chart] = ()
    paper: Paper = PROMPTING
    over_seeds: bool = False

    def to_json(self) -> dict[str, Any]:
        """The same as what ``json`` can write; there is no NaN in it."""
        return {
            "title": self.title,
            "tables": [table.to_json() for table in self.tables],
            "findings": [_finding(finding) for finding in self.findings],
            "notes": list(self.notes),
            "texts": [asdict(texts) for texts in self.texts],
            "charts": [chart.to_json() for chart in self.charts],
            "paper": asdict(self.paper),
            "over_seeds": self.over_seeds,
        }


def _finding(finding: Finding) -> dict[str, Any]:
    differences = [{"value": _number(each.value), **_spread(each)} for each in finding.differences]
    return {**asdict(finding), "differences": differences, "verdict": finding.verdict}


def _spread(number: Estimate, scale: float = 1) -> dict[str, float | None]:
    """The standard error, and half of the interval where that is told."""
    of = {"se": _number(scale * number.se)}
    if number.half_interval is None:
        return of
    return of | {"half_interval": _number(scale * number.half_interval)}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
