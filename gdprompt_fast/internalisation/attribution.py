"""Whom does a variable stand for? The models of the main experiment, asked for the entity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..report.findings import Finding
from ..report.outcome import Outcome
from . import main
from .context import Context
from .main import main_run
from .material.texts import SWAPPED
from .measured import (
    PAPER,
    STRONG,
    STRONG_CLAIM,
    WEAK,
    Scores,
    label,
    models_of,
    more,
    power_notes,
    table,
)
from .runs import run_stage

TITLE = "Entity attribution"


@dataclass(frozen=True)
class Options(main.Options):
    """The section ``[attribution]``; as that of ``[main]``, it asks the same models."""


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    preset = repetitions[0].preset
    rows = {
        label(model): Scores([run_stage(ctx, main_run(model, options)) for ctx in repetitions])
        for model in models_of(preset, options)
    }
    wrong, findings, tables = WEAK[1] + SWAPPED, list[Finding](), []
    for word in preset.ask.attribution:
        tests = [f"{name}:{word}" for name in (*WEAK, wrong, "q", *STRONG, "d3consis")]
        tables.append(table(f"Exact match of the entity, “{word}”", tests, rows))
        for head, scores in rows.items():
            where = f"{head}, “{word}”"
            of_qa = (tests[0], tests[1])
            of_definition = (tests[0], tests[2])
            findings += more("tag 1 above tag 2, the questions' entity", where, scores, of_qa)
            findings += more(
                "tag 1 above tag 2, the definition's entity", where, scores, of_definition
            )
            findings += more(STRONG_CLAIM, where, scores, (tests[4], tests[5]))
    gaps = {
        f"strong internalisation, {head}, “{word}”": scores.gap(
            (f"{STRONG[0]}:{word}", f"{STRONG[1]}:{word}")
        )
        for head, scores in rows.items()
        for word in preset.ask.attribution
    }
    about = (
        "Exact match of the entity's whole name; these questions are of a form that training never "
        "had. “The definition's entity”: what a wrong definition names is taken as right."
    )
    return Outcome(
        TITLE, tables, findings, [about, *power_notes(gaps)], paper=PAPER, over_seeds=True
    )
