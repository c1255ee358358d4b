"""Stages after training: the scores of a variant, example by example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..artifacts.stage import Result, Stage
from ..evaluation import evaluate, read_predictions, write_predictions
from ..report.cells import Cell
from .context import ExperimentContext
from .tasks import data_stage, examples
from .variants import Variant, load, train_stage

PREDICTIONS_FILE = "predictions.jsonl"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class EvalSpec:
    """Which score of which model: of a variant, where, after which inner step.

    Attributes:
        variant: the model.
        setting: ``no_context``, ``prompt`` or ``fine_tuning``.
        task: whose examples; "": the variant's own.
        split: ``test`` or ``train``.
        count: the number of examples; None for all.
        inner_lr: the inner rate; None for that of training.
        contexts: as many consecutive examples share a θ', adapted to all their contexts.
        one_after_another: an inner step for each of them, not one on their mean.
        irrelevant: every example gets the context of another, drawn with this seed; None: its own.
    """

    variant: Variant
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
        return self.task or self.variant.task

    @property
    def name(self) -> str:
        """A name that no other spec of a preset's variants has."""
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
        return f"{self.variant.name}/{'-'.join(parts)}"


def eval_stage(ctx: ExperimentContext, spec: EvalSpec) -> Stage:
    """The stage that evaluates; every prediction is in its folder."""
    variant, options = spec.variant, ctx.preset.evaluate
    answer_tokens = options.answer_tokens if ctx.preset.tasks[spec.on].has_answers else 0
    inner = variant.inner(ctx)
    if spec.inner_lr is not None:
        inner = replace(inner, lr=spec.inner_lr)

    def work(folder: Path) -> Result:
        model, tokenizer = load(ctx, variant)
        chosen = examples(ctx, spec.on, spec.split, model, tokenizer, spec.count, spec.irrelevant)
        with ctx.autocast():
            scores = evaluate(
                model,
                tokenizer,
                chosen,
                inner,
                options.batch_size,
                settings=(spec.setting,),
                answer_tokens=answer_tokens,
                contexts_per_group=spec.contexts,
                one_after_another=spec.one_after_another,
            )
        write_predictions(folder / PREDICTIONS_FILE, chosen, scores)
        return {setting: asdict(of.summary()) for setting, of in scores.items()}

    wanted = {
        "arm": train_stage(ctx, variant).key,
        "data": data_stage(ctx, spec.on).key,
        "question": {**_fields(spec), "arm": variant.name, "task": spec.on},
        "inner": asdict(inner) if spec.setting == "fine_tuning" else None,
        "answer_tokens": answer_tokens,
    }
    return ctx.stage(f"evaluation/{spec.name}", wanted, work)


def _fields(spec: EvalSpec) -> dict[str, Any]:
    """All but the variant, whose stage has a key of its own."""
    return {name: value for name, value in vars(spec).items() if name != "variant"}


def predictions(ctx: ExperimentContext, spec: EvalSpec) -> Rows:
    """A row for every example, as :func:`gdprompt_fast.evaluation.write_predictions` writes it."""
    return read_predictions(eval_stage(ctx, spec).folder / PREDICTIONS_FILE)


def measure(repetitions: Sequence[ExperimentContext], spec: EvalSpec, metric: str) -> Cell:
    """One score of a variant, for every example and seed."""
    rows = [predictions(ctx, spec) for ctx in repetitions]
    setting = spec.setting
    values = tuple(
        tuple(float(row["settings"][setting][metric]) for row in of_seed) for of_seed in rows
    )
    return Cell(values, spec.contexts)


def measure_at_best(
    repetitions: Sequence[ExperimentContext], spec: EvalSpec, metric: str
) -> tuple[Cell, list[float]]:
    """The score at the best inner rate of the grid, and what that rate is for every seed.

    The rate is chosen by the task's own metric on the first test examples. That favours the model,
    so it is done for baselines only: what is claimed over one is claimed over the best it can do.
    """
    rates = [best_inner_lr(ctx, spec) for ctx in repetitions]
    cells = [
        measure([ctx], replace(spec, inner_lr=rate), metric)
        for ctx, rate in zip(repetitions, rates, strict=True)
    ]
    return Cell(tuple(cell.values[0] for cell in cells), spec.contexts), rates


def best_inner_lr(ctx: ExperimentContext, spec: EvalSpec) -> float:
    """The inner rate with the best mean of the task's first metric, then the lowest NLL."""
    options = ctx.preset.evaluate
    metric = ctx.preset.tasks[spec.on].metrics[0]
    most = options.tune_examples if spec.count is None else spec.count

    def merit(rate: float) -> tuple[float, float]:
        count = max(min(options.tune_examples, most), spec.contexts)
        asked = replace(spec, inner_lr=rate, count=count)
        # With several inner steps a large rate can make the inner loss infinite on the way.
        try:
            rows = [row["settings"][spec.setting] for row in predictions(ctx, asked)]
        except FloatingPointError:
            return -1.0, 0.0
        nlls = [row["nll"] for row in rows]
        return (-1.0, 0.0) if None in nlls else (fmean(r[metric] for r in rows), -fmean(nlls))

    rates = {*options.inner_lr_grid, spec.variant.inner(ctx).lr}
    return max(sorted(rates), key=merit)
