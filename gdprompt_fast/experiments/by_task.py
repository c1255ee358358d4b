"""A table with a row for every kind of model and a column for every task and metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..report.cells import Cell
from ..report.findings import Named
from ..report.outcome import Table
from .paper import Numbers
from .preset import METRICS, ExperimentTask

Cells = Mapping[str, Cell]  # by kind


def table_by_task(
    title: str,
    tasks: Mapping[str, ExperimentTask],
    heads: Mapping[str, str],
    cells: Callable[[str, str], Cells],
    paper: Mapping[str, Numbers],
) -> tuple[Table, dict[str, dict[str, Named]]]:
    """The table, and for every task its cells in the task's first metric, by kind, with names.

    Args:
        tasks: by the name that the paper's numbers have.
        heads: the heads of the rows, by kind.
        cells: task name and metric to the cells.
        paper: the paper's numbers by task and kind; they are of the first metric.
    """
    rows: dict[str, list[Cell | None]] = {head: [] for head in heads.values()}
    columns, numbers, first = [], {}, {}
    for name, task in tasks.items():
        for metric in task.metrics:
            column = f"{task.label}, {METRICS[metric]}"
            columns.append(column)
            measured = cells(name, metric)
            for kind, head in heads.items():
                rows[head].append(measured[kind])
            if metric == task.metrics[0]:
                first[name] = {kind: Named(heads[kind], cell) for kind, cell in measured.items()}
                for kind, number in paper.get(name, {}).items():
                    numbers[heads[kind], column] = number
    return Table(title, columns, rows, numbers), first


def chosen(tasks: Mapping[str, ExperimentTask], names: Sequence[str]) -> dict[str, ExperimentTask]:
    """The tasks of these names, in their order."""
    return {name: tasks[name] for name in names}


def better_base(kinds: Mapping[str, Named]) -> Named:
    """The model that was not meta-trained at the better of its two rates."""
    return max(kinds["none"], kinds["none, best"], key=lambda base: base.cell.mean)
