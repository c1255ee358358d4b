"""Table 5: is it this context that helps, or any context? Fine-Tuning on another example's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ..config.fields import Config
from ..errors import UserError
from ..report.cells import Cell
from ..report.findings import destroyed
from ..report.outcome import Outcome
from . import paper
from .by_task import Cells, chosen, table_by_task
from .context import ExperimentContext
from .forgetting import text_tables
from .measure import EvalSpec, measure
from .preset import Preset
from .variants import Variant

TITLE = "Table 5: the right context and an irrelevant one"
OBJECTIVE, BASE = "gold", "no meta-training"
HEADS = {
    "right": "Fine-Tuning, right context",
    "irrelevant": "Fine-Tuning, irrelevant context",
    "no_context": "No Context",
    "base": "no meta-training: Fine-Tuning, right context",
    "base, irrelevant": "no meta-training: Fine-Tuning, irrelevant context",
    "base, no_context": "no meta-training: No Context",
}


@dataclass(frozen=True)
class Options(Config):
    """The section ``[table5]``: the names of the tasks, and a seed for every draw of irrelevant
    contexts.
    """

    tasks: tuple[str, ...]
    irrelevant_seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.irrelevant_seeds:
            raise UserError("irrelevant_seeds: expected at least one integer, got none")


def run(repetitions: Sequence[ExperimentContext], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""

    def irrelevant(variant: Variant, metric: str) -> Cell:
        asked = [EvalSpec(variant, irrelevant=seed) for seed in options.irrelevant_seeds]
        return mean_of_draws([measure(repetitions, spec, metric) for spec in asked])

    def cells(task: str, metric: str) -> Cells:
        variant, base = _models(task).values()
        return {
            "right": measure(repetitions, EvalSpec(variant), metric),
            "irrelevant": irrelevant(variant, metric),
            "no_context": measure(repetitions, EvalSpec(variant, "no_context"), metric),
            "base": measure(repetitions, EvalSpec(base), metric),
            "base, irrelevant": irrelevant(base, metric),
            "base, no_context": measure(repetitions, EvalSpec(base, "no_context"), metric),
        }

    tasks = chosen(repetitions[0].preset.tasks, options.tasks)
    table, named = table_by_task(TITLE, tasks, HEADS, cells, paper.TABLE5)
    claim = "an irrelevant context destroys the gain"
    findings = [
        destroyed(
            claim, tasks[task].label, kinds["right"], kinds["irrelevant"], kinds["no_context"]
        )
        for task, kinds in named.items()
    ]
    columns = {tasks[task].label: _models(task) for task in tasks}
    forgotten, about_it = text_tables(repetitions, columns, BASE)
    notes = [
        "An irrelevant context is that of another example of the same test set; the mean of "
        f"{len(options.irrelevant_seeds)} draws. The first three rows are meta-trained with the "
        "gold objective; all at the rate of meta-training."
    ]
    return Outcome(TITLE, [table, *forgotten], [*findings, *about_it], notes)


def variants(preset: Preset, options: Options) -> list[Variant]:
    """All that it compares."""
    return [variant for task in options.tasks for variant in _models(task).values()]


def _models(task: str) -> dict[str, Variant]:
    return {"meta-trained": Variant(task, OBJECTIVE), BASE: Variant(task)}


def mean_of_draws(draws: Sequence[Cell]) -> Cell:
    """The mean over draws for every example, the same in each."""
    return Cell(
        tuple(
            tuple(fmean(of_example) for of_example in zip(*of_seed, strict=True))
            for of_seed in zip(*(draw.values for draw in draws), strict=True)
        )
    )
