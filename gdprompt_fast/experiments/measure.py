"""Stages after training: the scores of an arm, example by example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..evaluation import evaluate, read_predictions, write_predictions
from .arms import Arm, load, made
from .cells import Cell
from .lab import Lab
from .stages import Result, Stage
from .tasks import data, examples

PREDICTIONS_FILE = "predictions.jsonl"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """What is asked of an arm: how well it does where.

    Attributes:
        arm: the model.
        setting: ``no_context``, ``prompt`` or ``fine_tuning``.
        task: whose examples; "": the arm's own.
        split: ``test`` or ``train``.
        count: the number of examples; None for all.
        inner_lr: the inner rate; None for that of training.
        contexts: as many consecutive examples share a θ', adapted to all their contexts.
        one_after_another: an inner step for each of them, not one on their mean.
        irrelevant: every example gets the context of another, drawn with this seed; None: its own.
    """

    arm: Arm
    setting: str = "fine_tuning"
    task: str = ""
    split: str = "test"
    count: int | None = None
    inner_lr: float | None = None
    contexts: int = 1
    one_after_another: bool = False
    irrelevant: int | None = None

    @property
    def on(self) -> str:
        """The task whose examples it is about."""
        return self.task or self.arm.task

    @property
    def name(self) -> str:
        """A name that no other question about a preset's arms has."""
        parts = [self.on, self.split, self.setting]
        if self.count is not None:
            parts.append(f"first-{self.count}")
        if self.inner_lr is not None:
            parts.append(f"rate-{self.inner_lr:g}")
        if self.contexts > 1:
            how = "one-after-another" if self.one_after_another else "batched"
            parts.append(f"{self.contexts}-contexts-{how}")
        if self.irrelevant is not None:
            parts.append(f"irrelevant-{self.irrelevant}")
        return f"{self.arm.name}/{'-'.join(parts)}"


def answered(lab: Lab, question: Question) -> Stage:
    """The stage that evaluates; every prediction is in its folder."""
    arm, options = question.arm, lab.preset.evaluate
    answer_tokens = options.answer_tokens if lab.preset.tasks[question.on].has_answers else 0
    inner = arm.inner(lab)
    if question.inner_lr is not None:
        inner = replace(inner, lr=question.inner_lr)

    def work(folder: Path) -> Result:
        model, tokenizer = load(lab, arm)
        chosen = examples(
            lab, question.on, question.split, model, tokenizer, question.count, question.irrelevant
        )
        with lab.autocast():
            scores = evaluate(
                model,
                tokenizer,
                chosen,
                inner,
                options.batch_size,
                settings=(question.setting,),
                answer_tokens=answer_tokens,
                contexts_per_group=question.contexts,
                one_after_another=question.one_after_another,
            )
        write_predictions(folder / PREDICTIONS_FILE, chosen, scores)
        return {setting: asdict(of.summary()) for setting, of in scores.items()}

    wanted = {
        "arm": made(lab, arm).key,
        "data": data(lab, question.on).key,
        "question": {**asdict(question), "arm": arm.name, "task": question.on},
        "inner": asdict(inner) if question.setting == "fine_tuning" else None,
        "answer_tokens": answer_tokens,
    }
    return lab.stage(f"evaluation/{question.name}", wanted, work)


def predictions(lab: Lab, question: Question) -> Rows:
    """A row for every example, as :func:`gdprompt_fast.evaluation.write_predictions` writes it."""
    return read_predictions(answered(lab, question).folder / PREDICTIONS_FILE)


def measure(labs: Sequence[Lab], question: Question, metric: str) -> Cell:
    """One score of an arm, for every example and seed."""
    rows = [predictions(lab, question) for lab in labs]
    setting = question.setting
    values = tuple(
        tuple(float(row["settings"][setting][metric]) for row in of_seed) for of_seed in rows
    )
    return Cell(values, question.contexts)


def measure_at_best(
    labs: Sequence[Lab], question: Question, metric: str
) -> tuple[Cell, list[float]]:
    """The score at the best inner rate of the grid, and what that rate is for every seed.

    The rate is chosen by the task's own metric on the first test examples. That favours the model,
    so it is done for baselines only: what is claimed over one is claimed over the best it can do.
    """
    rates = [best_inner_lr(lab, question) for lab in labs]
    cells = [
        measure([lab], replace(question, inner_lr=rate), metric)
        for lab, rate in zip(labs, rates, strict=True)
    ]
    return Cell(tuple(cell.values[0] for cell in cells), question.contexts), rates


def best_inner_lr(lab: Lab, question: Question) -> float:
    """The inner rate with the best mean of the task's first metric, then the lowest NLL."""
    options = lab.preset.evaluate
    metric = lab.preset.tasks[question.on].metrics[0]

    def merit(rate: float) -> tuple[float, float]:
        count = max(options.tune_examples, question.contexts)
        asked = replace(question, inner_lr=rate, count=count)
        # With several inner steps a large rate can make the inner loss infinite on the way.
        try:
            rows = [row["settings"][question.setting] for row in predictions(lab, asked)]
        except FloatingPointError:
            return -1.0, 0.0
        nlls = [row["nll"] for row in rows]
        return (-1.0, 0.0) if None in nlls else (fmean(r[metric] for r in rows), -fmean(nlls))

    rates = {*options.inner_lr_grid, question.arm.inner(lab).lr}
    return max(sorted(rates), key=merit)
