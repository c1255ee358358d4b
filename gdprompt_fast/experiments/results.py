"""What an experiment found: numbers in tables, findings, words; and how that becomes JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .cells import Cell
from .findings import Finding

PERCENT, NATS = "%", "nats a token"  # units of tables

PaperNumbers = Mapping[tuple[str, str], float | None]


@dataclass(frozen=True)
class Table:
    """Cells by row and column, each a share of examples or a mean score between 0 and 1, or an NLL.

    Attributes:
        title: what is measured, and on what.
        columns: the heads of the columns.
        rows: for every row's head its cells; None where there is nothing to measure.
        paper: the paper's own numbers in %, by the heads of row and column.
        unit: ``PERCENT`` for shares and scores, ``NATS`` for an NLL.
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
            "se": _number(scale * cell.se),
            "examples": cell.examples,
            "per_seed": [_number(scale * mean) for mean in cell.per_seed],
            "paper": self.paper.get((row, column)),
        }


@dataclass(frozen=True)
class Texts:
    """A table of words, such as answers side by side."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Outcome:
    """Everything that an experiment reports.

    Attributes:
        title: of the experiment.
        tables: its numbers; its figure has a panel for each.
        findings: what the numbers show or do not show.
        notes: how to read them.
        texts: tables of words.
    """

    title: str
    tables: Sequence[Table]
    findings: Sequence[Finding]
    notes: Sequence[str]
    texts: Sequence[Texts] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as what ``json`` can write; there is no NaN in it."""
        return {
            "title": self.title,
            "tables": [table.to_json() for table in self.tables],
            "findings": [_finding(finding) for finding in self.findings],
            "notes": list(self.notes),
            "texts": [asdict(texts) for texts in self.texts],
        }


def _finding(finding: Finding) -> dict[str, Any]:
    differences = [
        {"value": _number(each.value), "se": _number(each.se)} for each in finding.differences
    ]
    return {**asdict(finding), "differences": differences, "verdict": finding.verdict}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
