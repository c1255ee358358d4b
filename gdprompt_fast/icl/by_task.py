"""Tables with a column for every task, and what they show or do not show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ..report.cells import Cell, Estimate
from ..report.findings import STANDARD_ERRORS, Finding, is_positive
from ..report.outcome import PERCENT, Table, Texts
from .context import IclContext
from .tasks import TASKS

COSINE = "cosine"  # the unit of similarities
Values = Callable[[IclContext, str], Sequence[float]]  # of a seed and a task: a number an example
Measure = Callable[[Sequence[IclContext], str], Cell]  # of all seeds and a task
Rows = Mapping[str, Measure]  # by head
PaperRows = Mapping[str, Mapping[str, float]]  # by head, then task

UNDEFINED = "“?” stands for 0/0: a similarity to an update of zero, a share of no changes."
CONTROLS_NOTE = (
    "Controls: FT at rate 0 (the same code, nothing moves); a random update, in every weight as "
    "long as FT's; an untrained model of the same configuration with fresh weights, with its own "
    "ZSL, ICL and FT. “Random vector” is the paper's: independent U[0, 1) numbers, not centred, in "
    "the place of what FT changed. FT at rate 0 has ZSL's SimAM, of the control's queries."
)


def mean_of(values: Values) -> Measure:
    """The mean over seeds and examples."""
    return lambda repetitions, task: Cell(tuple(tuple(values(ctx, task)) for ctx in repetitions))


def by_task(
    title: str,
    repetitions: Sequence[IclContext],
    tasks: Sequence[str],
    rows: Rows,
    paper: PaperRows | None = None,
    unit: str = PERCENT,
) -> Table:
    """A table; the paper's numbers are in its unit."""
    cells = {head: [of(repetitions, task) for task in tasks] for head, of in rows.items()}
    numbers = {
        (head, TASKS[task].title): number
        for head, of_tasks in (paper or {}).items()
        for task, number in of_tasks.items()
        if task in tasks
    }
    return Table(title, [TASKS[task].title for task in tasks], cells, numbers, unit)


def above(claim: str, table: Table, high: str, low: str, margin: float = 0.0) -> list[Finding]:
    """For every column, whether the row ``high`` is above ``low`` less ``margin`` by more than two
    standard errors of the difference, taken example by example; margin in the numbers' own scale.

    Where one row has fewer examples, a control, both are of the first that both have.
    """
    scale, unit = (100, " %") if table.unit == PERCENT else (1, "")
    findings = []
    for index, column in enumerate(table.columns):
        one, other = (table.rows[head][index] for head in (high, low))
        assert one is not None and other is not None
        counts = [min(map(len, both)) for both in zip(one.values, other.values, strict=True)]
        is_cut = sum(counts) < max(one.examples, other.examples)
        one, other = one.first(counts), other.first(counts)
        difference = one.minus(other)
        numbers = [
            f"{head} {_said(scale * mean, unit)}"
            for head, mean in ((high, one.mean), (low, other.mean))
        ]
        because = f"{', '.join(numbers)}; difference {_interval(difference, scale)}"
        because += f"; at most {scale * margin:g} less counts as kept" if margin else ""
        because += f"; of the first {max(counts)} of each seed." if is_cut else "."
        counted = Estimate(difference.value + margin, difference.se)
        findings.append(Finding(claim, column, is_positive(counted), because, (difference,)))
    return findings


def beside_logs(tables: Mapping[str, Table], logged: Mapping[str, PaperRows]) -> list[Texts]:
    """Numbers that the paper's code logged and the paper does not have, beside ours; none where
    ``tables`` has none of their tasks.

    Args:
        tables: by measure; ``logged`` has some of them, in their units.
    """
    rows = []
    for measure, of_heads in logged.items():
        table = tables[measure]
        scale = 100 if table.unit == PERCENT else 1
        for head, of_tasks in of_heads.items():
            for index, column in enumerate(table.columns):
                number = {TASKS[task].title: each for task, each in of_tasks.items()}.get(column)
                cell = table.rows[head][index]
                if number is not None and cell is not None:
                    ours = f"{_said(scale * cell.mean, '')} ± {_said(scale * cell.se, '')}"
                    rows.append((f"{table.title}: {head}", column, f"{number:g}", ours))
    columns = ("measure", "task", "the code's logs", "here")
    return [Texts("In logs of the paper's code, not in the paper", columns, rows)] if rows else []


def sizes(repetitions: Sequence[IclContext], tasks: Sequence[str]) -> str:
    """How many queries there are, and demonstrations in prompts: a note."""
    fit, queries = [], []
    for task in tasks:
        title = TASKS[task].title
        in_prompt = sorted({len(ctx.prompts(task).spans) for ctx in repetitions})
        fit.append(f"{title} {' or '.join(map(str, in_prompt))}")
        every, control = (repetitions[0].count(task, control) for control in (False, True))
        queries.append(f"{title} {every}" + (f" ({control})" if control < every else ""))
    drawn = repetitions[0].preset.prompt.demonstrations
    return (
        f"FT learns from {drawn} demonstrations; in ICL's prompt fit: {', '.join(fit)}. Queries of "
        f"a seed (for controls, the first of them): {', '.join(queries)}. With a control, a method "
        "is compared on the control's queries."
    )


def _said(value: float, unit: str) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3g}{unit}"


def _interval(difference: Estimate, scale: float) -> str:
    """With two standard errors on either side."""
    value, reach = scale * difference.value, scale * STANDARD_ERRORS * difference.se
    if math.isnan(value) or math.isnan(reach):
        return "undefined"
    return f"{value:+.3g}, between {value - reach:+.3g} and {value + reach:+.3g}"
