"""What a model forgets: the NLL of running text, before and after meta-training."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..artifacts.stage import Result, Stage
from ..data import Example
from ..data.tokenise import Texts
from ..evaluation import evaluate
from ..report.cells import Cell
from ..report.findings import Finding, Named, forgets_little
from ..report.outcome import NATS, Table
from .context import ExperimentContext
from .tasks import data_stage, running_text
from .variants import Variant, load, train_stage

TITLE = "Running text ({}), NLL in nats a token"

Variants = Mapping[str, Variant]  # by the heads of rows


def text_tables(
    repetitions: Sequence[ExperimentContext], columns: Mapping[str, Variants], base: str
) -> tuple[list[Table], list[Finding]]:
    """The table of running text's NLL at θ itself, and for every other row whether it rose beside
    that of the row ``base``; nothing where the preset names no such text.

    Args:
        columns: the variants by the heads of columns and rows.
    """
    preset = repetitions[0].preset
    if preset.text is None:
        return [], []
    cells = {
        column: {head: measure_text(repetitions, variant) for head, variant in rows.items()}
        for column, rows in columns.items()
    }
    heads = list(dict.fromkeys(head for rows in columns.values() for head in rows))
    rows = {head: [cells[column].get(head) for column in columns] for head in heads}
    title = TITLE.format(preset.tasks[preset.text.task].label)
    margin = preset.findings.text_margin
    findings = [
        forgets_little(f"{column}, {head}", Named(head, cell), Named(base, of_column[base]), margin)
        for column, of_column in cells.items()
        for head, cell in of_column.items()
        if head != base
    ]
    return [Table(title, list(columns), rows, unit=NATS)], findings


def measure_text(repetitions: Sequence[ExperimentContext], variant: Variant) -> Cell:
    """The mean NLL of a token, for every text and seed."""
    stages = [text_stage(ctx, variant) for ctx in repetitions]
    return Cell(tuple(tuple(stage.result["nll_per_token"]) for stage in stages))


def text_stage(ctx: ExperimentContext, variant: Variant) -> Stage:
    """The stage that measures a variant on the test texts of ``[text]``, without an inner step."""
    task, options = ctx.preset.text_task, ctx.preset.evaluate
    assert ctx.preset.text is not None
    count = ctx.preset.text.examples

    def work(folder: Path) -> Result:
        model, tokenizer = load(ctx, variant)
        rows = [_whole(row) for row in running_text(ctx, "test", model, tokenizer, count)]
        inner, alone = variant.inner(ctx), ("no_context",)
        with ctx.autocast():
            scores = evaluate(
                model,
                tokenizer,
                rows,
                inner,
                max(1, options.batch_size // 4),  # the logits of whole rows are kept
                settings=alone,
                answer_tokens=0,
            )["no_context"]
        return {"nll_per_token": (scores.nll.double() / scores.tokens).tolist()}

    wanted = {
        "arm": train_stage(ctx, variant).key,
        "data": data_stage(ctx, task).key,
        "examples": count,
    }
    return ctx.stage(f"evaluation/{variant.name}/running-text", wanted, work)


def _whole(row: array[int]) -> Example:
    """A row as an example that is all response, but for its first token."""
    first, rest = row[:1], row[1:]
    return Example(first, first, first, rest, Texts("", "", "", None))
