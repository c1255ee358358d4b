"""Table 5: is it this context that helps, or any context? Fine-Tuning on another example's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from . import paper
from .arms import Arm
from .cells import Cell
from .findings import Named, destroyed
from .lab import Lab
from .measure import Question, measure
from .preset import METRICS
from .results import Outcome, Table

TITLE = "Table 5: the right context and an irrelevant one"
OBJECTIVES = {"meta-trained": "gold", "no meta-training": "none"}
HEADS = {
    "right": "Fine-Tuning, right context",
    "irrelevant": "Fine-Tuning, irrelevant context",
    "no_context": "No Context",
}


@dataclass(frozen=True)
class Settings:
    """The section ``[table5]``: the names of the tasks, and a seed for every draw of irrelevant
    contexts.
    """

    tasks: tuple[str, ...]
    irrelevant_seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.irrelevant_seeds:
            raise ValueError("irrelevant_seeds: expected at least one integer, got none")


def run(labs: Sequence[Lab], settings: Settings) -> Outcome:
    """Measures and compares; every seed is a lab."""
    tasks = labs[0].preset.tasks
    tables, findings = [], []
    for model, objective in OBJECTIVES.items():
        columns, numbers = [], {}
        rows: dict[str, list[Cell | None]] = {head: [] for head in HEADS.values()}
        for task in settings.tasks:
            for metric in tasks[task].metrics:
                columns.append(f"{tasks[task].label}, {METRICS[metric]}")
                cells = _cells(labs, Arm(task, objective), metric, settings)
                for kind, cell in cells.items():
                    rows[HEADS[kind]].append(cell)
                if metric == tasks[task].metrics[0] and objective != "none":
                    named = [Named(HEADS[kind], cell) for kind, cell in cells.items()]
                    claim = "an irrelevant context destroys the gain"
                    findings.append(destroyed(claim, tasks[task].label, *named))
                    for kind, number in paper.TABLE5.get(task, {}).items():
                        numbers[HEADS[kind], columns[-1]] = number
        tables.append(Table(model, columns, rows, numbers))
    notes = [
        "An irrelevant context is that of another example of the same test set; the mean of "
        f"{len(settings.irrelevant_seeds)} draws. Meta-training with the gold objective."
    ]
    return Outcome(TITLE, tables, findings, notes)


def _cells(labs: Sequence[Lab], arm: Arm, metric: str, settings: Settings) -> dict[str, Cell]:
    """By the keys of ``HEADS``."""
    draws = [
        measure(labs, Question(arm, irrelevant=seed), metric) for seed in settings.irrelevant_seeds
    ]
    return {
        "right": measure(labs, Question(arm), metric),
        "irrelevant": _mean(draws),
        "no_context": measure(labs, Question(arm, "no_context"), metric),
    }


def _mean(draws: Sequence[Cell]) -> Cell:
    """The mean over draws for every example, in the same order in each."""
    return Cell(
        tuple(
            tuple(fmean(of_example) for of_example in zip(*of_seed, strict=True))
            for of_seed in zip(*(draw.values for draw in draws), strict=True)
        )
    )
