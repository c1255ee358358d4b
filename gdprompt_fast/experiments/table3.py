"""Table 3: does what was meta-trained on one task carry over to another, and does it stay?

On the target task, models are compared that were never meta-trained, meta-trained on the target
itself, or meta-trained on the source task with ordinary fine-tuning on the target afterwards
(sequential) or in every outer step (joint). On the source, the same models show what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import paper
from .arms import Arm
from .cells import Cell
from .findings import Named, larger
from .lab import Lab
from .measure import Question, measure, measure_at_best
from .preset import METRICS, check_counts
from .results import Outcome, Table

TITLE = "Table 3: transfer and retention, accuracy after Fine-Tuning"
OBJECTIVE = "gold"


@dataclass(frozen=True)
class Settings:
    """The section ``[table3]``: two tasks, and on how many examples of the target the ordinary
    fine-tuning goes.
    """

    source: str
    target: str
    examples: int

    def __post_init__(self) -> None:
        check_counts(self, "examples")


def run(labs: Sequence[Lab], settings: Settings) -> Outcome:
    """Measures and compares; every seed is a lab."""
    tasks = labs[0].preset.tasks
    source, target, count = settings.source, settings.target, settings.examples
    heads = {
        "none": "no meta-training",
        "in-domain": "meta-trained on the same task",
        "sequential": f"{tasks[source].label}, then {tasks[target].label}",
        "joint": f"{tasks[source].label} and {tasks[target].label} jointly",
    }
    transferred = {
        "sequential": Arm(source, OBJECTIVE, then=target, then_examples=count),
        "joint": Arm(source, OBJECTIVE, joint=target, joint_examples=count),
    }
    best = f"{heads['none']}, best inner rate"
    rows: dict[str, list[Cell | None]] = {head: [] for head in (*heads.values(), best)}
    columns, numbers, first = [], {}, {}
    for task in (target, source):
        arms = {"none": Arm(task), "in-domain": Arm(task, OBJECTIVE), **transferred}
        for metric in tasks[task].metrics:
            columns.append(f"{tasks[task].label}, {METRICS[metric]}")
            cells = {kind: measure(labs, Question(arm, task=task), metric) for kind, arm in arms.items()}
            for kind, cell in cells.items():
                rows[heads[kind]].append(cell)
            rows[best].append(measure_at_best(labs, Question(Arm(task)), metric)[0])
            if metric == tasks[task].metrics[0]:
                first[task] = {kind: Named(heads[kind], cell) for kind, cell in cells.items()}
                for kind, number in paper.TABLE3.get(task, {}).items():
                    numbers[heads[kind], columns[-1]] = number
    findings = [
        larger(claim, f"{kind}, {tasks[task].label}", first[task][kind], first[task]["none"])
        for claim, task in (("meta-training carries over", target), ("meta-training stays", source))
        for kind in transferred
    ]
    notes = [
        "Meta-training with the gold objective; ordinary fine-tuning in the Prompt and No Context "
        "formats, as in the preparation. Fine-Tuning is one inner step at the training's rate."
    ]
    return Outcome(TITLE, [Table(TITLE, columns, rows, numbers)], findings, notes)
