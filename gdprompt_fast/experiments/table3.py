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
from .by_task import Cells, chosen, table_by_task
from .findings import Named, larger
from .lab import Lab
from .measure import Question, measure, measure_at_best
from .preset import check_counts
from .results import Outcome

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
    source, target, count = settings.source, settings.target, settings.examples
    tasks = chosen(labs[0].preset.tasks, (target, source))
    both = (tasks[source].label, tasks[target].label)
    heads = {
        "none": "no meta-training",
        "none, best": "no meta-training, best inner rate",
        "in-domain": "meta-trained on the same task",
        "sequential": "meta-trained on {}, then fine-tuned on {}".format(*both),
        "joint": "meta-trained on {}, jointly fine-tuned on {}".format(*both),
    }

    def cells(task: str, metric: str) -> Cells:
        arms = {
            "none": Arm(task),
            "in-domain": Arm(task, OBJECTIVE),
            "sequential": Arm(source, OBJECTIVE, then=target, ordinary_examples=count),
            "joint": Arm(source, OBJECTIVE, joint=target, ordinary_examples=count),
        }
        asked = {kind: Question(arm, task=task) for kind, arm in arms.items()}
        measured = {kind: measure(labs, question, metric) for kind, question in asked.items()}
        measured["none, best"], _ = measure_at_best(labs, asked["none"], metric)
        return measured

    table, named = table_by_task(TITLE, tasks, heads, cells, paper.TABLE3)

    def better_base(task: str) -> Named:
        kinds = named[task]
        return max(kinds["none"], kinds["none, best"], key=lambda base: base.cell.mean)

    findings = [
        larger(claim, tasks[task].label, named[task][kind], better_base(task))
        for claim, task in (("meta-training carries over", target), ("meta-training stays", source))
        for kind in ("sequential", "joint")
    ]
    notes = [
        "Meta-training with the gold objective; ordinary fine-tuning in the Prompt and No Context "
        "formats, as in the preparation. Fine-Tuning is one inner step at the training's rate; of "
        "models that were not meta-trained also at their best rate."
    ]
    return Outcome(TITLE, [table], findings, notes)
