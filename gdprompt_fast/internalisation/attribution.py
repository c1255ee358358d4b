"""Whom does a variable stand for? The models of the main experiment, asked for the entity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..report.findings import Finding
from ..report.outcome import Outcome
from ..report.over_seeds import NamedSeeds, larger_over_seeds, none_over_seeds
from . import main
from .context import Context
from .main import main_run
from .material.texts import SWAPPED
from .measured import (
    NONE_WITHIN,
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
    with_zero,
)
from .runs import run_stages

TITLE = "Entity attribution"


@dataclass(frozen=True)
class Options(main.Options):
    """The section ``[attribution]``; as that of ``[main]``, it asks the same models."""


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    preset = repetitions[0].preset
    rows = {
        label(model): Scores(run_stages(repetitions, main_run(model, options), model))
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
            findings += _none_of_tag_2(where, scores, tests[0], tests[1])
            findings += _larger_than_on_questions(where, scores, word)
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


def _none_of_tag_2(where: str, scores: Scores, tag_1: str, tag_2: str) -> list[Finding]:
    """Whether the questions' entity is never named where the definition names another."""
    claim = "tag 2, the questions' entity: none"
    learnt = with_zero(scores, tag_1)
    return [
        none_over_seeds(claim, where, *pair, NONE_WITHIN, learnt)
        for pair in with_zero(scores, tag_2)
    ]


def _larger_than_on_questions(where: str, scores: Scores, word: str) -> list[Finding]:
    """Whether the tag makes more of a difference here than to the facts asked for."""
    findings = []
    for kind, pair in (("weak", WEAK), ("strong", STRONG)):
        here = scores.gap((f"{pair[0]}:{word}", f"{pair[1]}:{word}"))
        there = scores.gap(pair)
        if here is not None and there is not None:
            claim = f"{kind} internalisation is larger on entities than on facts"
            named = (NamedSeeds("of the entity", here), NamedSeeds("of facts", there))
            findings.append(larger_over_seeds(claim, where, *named))
    return findings
