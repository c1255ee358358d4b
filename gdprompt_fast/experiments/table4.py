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

from ..errors import UserError
from . import paper
from .arms import Arm
from .cells import Cell
from .lab import Lab
from .measure import Question, Rows, predictions
from .preset import OBJECTIVES, Preset, check_choice, check_counts
from .results import Outcome, PaperNumbers, Table, Texts

TITLE = "Table 4: classes of examples by what the gradient step changes"
CLASSES = {
    (False, False): "always incorrect",
    (True, True): "always correct",
    (True, False): "correct without context",
    (False, True): "only with context",
}
SPLITS = {"test": "test (the paper's validation)", "train": "train"}
BEFORE, AFTER = "no_context", "fine_tuning"


@dataclass(frozen=True)
class Settings:
    """The section ``[table4]``: the task, the objective, the number of training examples to
    classify, and the number of examples of every class to show.
    """

    task: str
    objective: str
    train_examples: int
    samples: int

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_counts(self, "train_examples", "samples")


def check(preset: Preset, settings: Settings) -> None:
    """Raises a ValueError if answers to the task are not generated."""
    if not preset.tasks[settings.task].has_answers:
        raise UserError(
            "preset, [table4]: task: expected one with a metric of generated answers, "
            f"got {settings.task}"
        )


def run(labs: Sequence[Lab], settings: Settings) -> Outcome:
    """Classifies and shows; every seed is a lab."""
    label = labs[0].preset.tasks[settings.task].label
    models = {
        f"meta-trained ({settings.objective})": Arm(settings.task, settings.objective),
        "no meta-training": Arm(settings.task),
    }
    tables = []
    for index, (name, arm) in enumerate(models.items()):
        columns = {
            head: _shares([_classes(lab, arm, split, settings) for lab in labs])
            for split, head in SPLITS.items()
        }
        rows = {each: [shares[each] for shares in columns.values()] for each in CLASSES.values()}
        numbers = _paper(settings) if index == 0 else {}
        tables.append(Table(f"{label}, {name}: share of examples", list(columns), rows, numbers))
    notes = [
        "An answer is correct if it matches a gold answer exactly, after normalisation. "
        "Always incorrect: wrong before the gradient step (No Context) and after it (Fine-Tuning); "
        "always correct: right both times; correct without context: right before, wrong after; "
        "only with context: wrong before, right after the step on its own context."
    ]
    return Outcome(TITLE, tables, [], notes, [_samples(labs[0], settings)])


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


def _both(lab: Lab, arm: Arm, split: str, settings: Settings) -> tuple[Rows, Rows]:
    """The predictions before and after the gradient step."""
    count = settings.train_examples if split == "train" else None
    before, after = (
        predictions(lab, Question(arm, setting, split=split, count=count))
        for setting in (BEFORE, AFTER)
    )
    return before, after


def _classes(lab: Lab, arm: Arm, split: str, settings: Settings) -> list[str]:
    return classify(*_both(lab, arm, split, settings))


def _shares(classes: Sequence[Sequence[str]]) -> dict[str, Cell]:
    """For every class the cell of its indicator, from the classes of examples, for every seed."""
    return {
        name: Cell(tuple(tuple(float(each == name) for each in of_seed) for of_seed in classes))
        for name in CLASSES.values()
    }


def _samples(lab: Lab, settings: Settings) -> Texts:
    """The first few test examples of every class, with the answers of both models."""
    before, after = _both(lab, Arm(settings.task, settings.objective), "test", settings)
    base = predictions(lab, Question(Arm(settings.task), AFTER))
    rows = []
    of_example = classify(before, after)
    for name in CLASSES.values():
        indices = [index for index, each in enumerate(of_example) if each == name]
        for index in indices[: settings.samples]:
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
    return Texts(f"The first test examples of every class, seed {lab.seed}", columns, rows)


def _paper(settings: Settings) -> PaperNumbers:
    if settings.task != paper.SQUAD:
        return {}
    return {
        (name, SPLITS[split]): number
        for split, numbers in paper.TABLE4.items()
        for name, number in numbers.items()
    }
