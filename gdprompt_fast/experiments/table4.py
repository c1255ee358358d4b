"""Table 4: what one gradient step changes, example by example.

An answer is correct if it matches a gold answer exactly (after SQuAD's normalisation). With the
model's answers to the query alone before the gradient step on the example's context (No Context)
and after it (Fine-Tuning), every example is in exactly one class:

    always incorrect           wrong before, wrong after
    always correct             right before, right after
    correct without context    right before, wrong after
    only with context          wrong before, right after
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config.fields import Config, check_counts
from ..errors import UserError
from ..report.cells import Cell
from ..report.outcome import Outcome, PaperNumbers, Table, Texts
from . import paper
from .context import ExperimentContext
from .forgetting import text_tables
from .measure import EvalSpec, Rows, predictions
from .preset import OBJECTIVES, Preset, check_choice
from .variants import Variant

TITLE = "Table 4: classes of examples by what the gradient step changes"
CLASSES = {
    (False, False): "always incorrect",
    (True, True): "always correct",
    (True, False): "correct without context",
    (False, True): "only with context",
}
SPLITS = {"test": "test (the paper's validation)", "train": "train"}
BEFORE, AFTER = "no_context", "fine_tuning"
BASE = "no meta-training"


@dataclass(frozen=True)
class Options(Config):
    """The section ``[table4]``: the task, the objective, the number of training examples to
    classify, and the number of examples of every class to show.
    """

    task: str
    objective: str
    train_examples: int
    samples: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective", self.objective, OBJECTIVES)
        check_counts(self, "train_examples", "samples")


def check(preset: Preset, options: Options) -> None:
    """Raises a ValueError if answers to the task are not generated."""
    if not preset.tasks[options.task].has_answers:
        raise UserError(
            "preset, [table4]: task: expected one with a metric of generated answers, "
            f"got {options.task}"
        )


def run(repetitions: Sequence[ExperimentContext], options: Options) -> Outcome:
    """Classifies and shows; every seed is a repetition."""
    label = repetitions[0].preset.tasks[options.task].label
    models = _models(options)
    tables = []
    for index, (name, variant) in enumerate(models.items()):
        columns = {
            head: _shares([_classes(ctx, variant, split, options) for ctx in repetitions])
            for split, head in SPLITS.items()
        }
        rows = {each: [shares[each] for shares in columns.values()] for each in CLASSES.values()}
        numbers = _paper(options) if index == 0 else {}
        tables.append(Table(f"{label}, {name}: share of examples", list(columns), rows, numbers))
    forgotten, findings = text_tables(repetitions, {label: models}, BASE)
    notes = [
        "An answer is correct if it matches a gold answer exactly, after normalisation. "
        "Always incorrect: wrong before the gradient step (No Context) and after it (Fine-Tuning); "
        "always correct: right both times; correct without context: right before, wrong after; "
        "only with context: wrong before, right after the step on its own context."
    ]
    samples = [_samples(repetitions[0], options)]
    return Outcome(TITLE, [*tables, *forgotten], findings, notes, samples)


def variants(preset: Preset, options: Options) -> list[Variant]:
    """All that it compares."""
    return list(_models(options).values())


def _models(options: Options) -> dict[str, Variant]:
    return {
        f"meta-trained ({options.objective})": Variant(options.task, options.objective),
        BASE: Variant(options.task),
    }


def classify(before: Rows, after: Rows) -> list[str]:
    """The class of every example.

    Args:
        before: predictions with the setting ``no_context``.
        after: predictions of the same examples with ``fine_tuning``.
    """
    return [
        CLASSES[_correct(one, BEFORE), _correct(other, AFTER)]
        for one, other in zip(before, after, strict=True)
    ]


def _correct(row: dict[str, Any], setting: str) -> bool:
    return bool(row["settings"][setting]["exact_match"] == 1)


def _answer(row: dict[str, Any], setting: str) -> str:
    return str(row["settings"][setting]["answer"])


def _both(
    ctx: ExperimentContext, variant: Variant, split: str, options: Options
) -> tuple[Rows, Rows]:
    """The predictions before and after the gradient step."""
    count = options.train_examples if split == "train" else None
    before, after = (
        predictions(ctx, EvalSpec(variant, setting, split=split, count=count))
        for setting in (BEFORE, AFTER)
    )
    return before, after


def _classes(ctx: ExperimentContext, variant: Variant, split: str, options: Options) -> list[str]:
    return classify(*_both(ctx, variant, split, options))


def _shares(classes: Sequence[Sequence[str]]) -> dict[str, Cell]:
    """For every class the cell of its indicator, from the classes of examples, for every seed."""
    return {
        name: Cell(tuple(tuple(float(each == name) for each in of_seed) for of_seed in classes))
        for name in CLASSES.values()
    }


def _samples(ctx: ExperimentContext, options: Options) -> Texts:
    """The first few test examples of every class, with the answers of both models."""
    before, after = _both(ctx, Variant(options.task, options.objective), "test", options)
    base = predictions(ctx, EvalSpec(Variant(options.task), AFTER))
    rows = []
    of_example = classify(before, after)
    for name in CLASSES.values():
        indices = [index for index, each in enumerate(of_example) if each == name]
        for index in indices[: options.samples]:
            rows.append(
                [
                    name,
                    after[index]["query"],
                    " / ".join(after[index]["answers"]),
                    _answer(base[index], AFTER),
                    _answer(before[index], BEFORE),
                    _answer(after[index], AFTER),
                ]
            )
    columns = [
        "class",
        "query",
        "gold",
        "BM, Fine-Tuning",
        "meta-trained, No Context",
        "meta-trained, Fine-Tuning",
    ]
    return Texts(f"The first test examples of every class, seed {ctx.seed}", columns, rows)


def _paper(options: Options) -> PaperNumbers:
    if options.task != paper.SQUAD:
        return {}
    return {
        (name, SPLITS[split]): number
        for split, numbers in paper.TABLE4.items()
        for name, number in numbers.items()
    }
