"""Table 3: does what was meta-trained on one task carry over to another, and does it stay?

On the target task, models are compared that were never meta-trained, meta-trained on the target
itself, or meta-trained on the source task with ordinary fine-tuning on the target afterwards
(sequential) or in every outer step (joint). On the source, the same models show what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.fields import Config, check_counts
from ..report.findings import larger
from ..report.outcome import Outcome
from . import paper
from .by_task import Cells, better_base, chosen, table_by_task
from .context import ExperimentContext
from .forgetting import text_tables
from .measure import EvalSpec, measure, measure_at_best
from .preset import Preset
from .variants import Variant

TITLE = "Table 3: transfer and retention, accuracy after Fine-Tuning"
OBJECTIVE = "gold"


@dataclass(frozen=True)
class Options(Config):
    """The section ``[table3]``: two tasks, and on how many examples of the target the ordinary
    fine-tuning goes.
    """

    source: str
    target: str
    examples: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "examples")


def run(repetitions: Sequence[ExperimentContext], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    source, target = options.source, options.target
    tasks = chosen(repetitions[0].preset.tasks, (target, source))
    both = (tasks[source].label, tasks[target].label)
    heads = {
        "none": "no meta-training",
        "none, best": "no meta-training, best inner rate",
        "in-domain": "meta-trained on the same task",
        "sequential": "meta-trained on {}, then fine-tuned on {}".format(*both),
        "joint": "meta-trained on {}, jointly fine-tuned on {}".format(*both),
    }

    def cells(task: str, metric: str) -> Cells:
        kinds = _kinds(task, options)
        asked = {kind: EvalSpec(variant, task=task) for kind, variant in kinds.items()}
        measured = {kind: measure(repetitions, spec, metric) for kind, spec in asked.items()}
        measured["none, best"], _ = measure_at_best(repetitions, asked["none"], metric)
        return measured

    table, named = table_by_task(TITLE, tasks, heads, cells, paper.TABLE3)

    findings = [
        larger(claim, tasks[task].label, named[task][kind], better_base(named[task]))
        for claim, task in (("meta-training carries over", target), ("meta-training stays", source))
        for kind in ("sequential", "joint")
    ]
    columns = {
        tasks[task].label: {heads[kind]: each for kind, each in _kinds(task, options).items()}
        for task in tasks
    }
    forgotten, about_it = text_tables(repetitions, columns, heads["none"])
    notes = [
        "Meta-training with the gold objective; ordinary fine-tuning in the Prompt and No Context "
        "formats, as in the preparation. Fine-Tuning is one inner step at the training's rate; of "
        "models that were not meta-trained also at their best rate."
    ]
    return Outcome(TITLE, [table, *forgotten], [*findings, *about_it], notes)


def variants(preset: Preset, options: Options) -> list[Variant]:
    """All that it compares."""
    kinds = (_kinds(task, options) for task in (options.target, options.source))
    return [variant for of_task in kinds for variant in of_task.values()]


def _kinds(task: str, options: Options) -> dict[str, Variant]:
    """What is compared on a task; the last two are the same on both."""
    source, target, count = options.source, options.target, options.examples
    return {
        "none": Variant(task),
        "in-domain": Variant(task, OBJECTIVE),
        "sequential": Variant(source, OBJECTIVE, then=target, ordinary_examples=count),
        "joint": Variant(source, OBJECTIVE, joint=target, ordinary_examples=count),
    }
