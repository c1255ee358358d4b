"""The main experiment on creative works, from T-REx's triples or others like them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..report.outcome import Outcome
from .context import Context
from .main import found, levels, notes, tables
from .material.subsets import WITH_THIRD_TAG
from .material.texts import TextRules
from .measured import PAPER, Scores, label, models_of
from .preset import TRIPLES, RunOptions
from .runs import Run, run_stage

TITLE = "Weak and strong internalisation: two stages of training on creative works"
HELD_OUT = 0.25


@dataclass(frozen=True)
class Options(RunOptions):
    """The section ``[trex]``."""

    source: str = TRIPLES


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    rules = TextRules(WITH_THIRD_TAG, held_out=HELD_OUT)
    rows = {}
    for model in models_of(repetitions[0].preset, options):
        run = Run(f"trex/{label(model)}", rules, options, model)
        rows[label(model)] = Scores([run_stage(ctx, run) for ctx in repetitions])
    findings = [
        finding
        for head, scores in rows.items()
        for finding in (*found(head, scores), *levels(head, scores))
    ]
    about = "Exact match of greedy answers; a quarter of the questions of an entity is held out."
    return Outcome(
        TITLE,
        tables("", rows),
        findings,
        [about, *notes(rows)],
        paper=PAPER,
        over_seeds=True,
    )
