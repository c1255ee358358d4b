"""The main experiment: two stages on people, by model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..report.findings import Finding
from ..report.outcome import Outcome, Table
from ..report.over_seeds import larger_over_seeds
from .context import Context
from .material.subsets import TWO_TAGS, WITH_THIRD_TAG
from .material.texts import TextRules
from .measured import (
    PAPER,
    STRONG,
    STRONG_CLAIM,
    WEAK,
    WEAK_CLAIM,
    Scores,
    label,
    models_of,
    more,
    named_pairs,
    none,
    power_notes,
    table,
    with_zero,
)
from .preset import RunOptions
from .runs import Run, run_stages
from .stages import NEVER_SEEN

TITLE = "Weak and strong internalisation: two stages of training on people"
FIRST_TESTS = (*WEAK, "q", "q_no_replacement_baseline")
SECOND_TESTS = (*STRONG, "d3consis", NEVER_SEEN, "d2incons")


@dataclass(frozen=True)
class Options(RunOptions):
    """The section ``[main]``.

    Attributes:
        third_tag: whether a tag that the first stage never had is among the second's.
    """

    third_tag: bool = True

    @property
    def fractions(self) -> dict[str, float]:
        """Of the subsets."""
        return WITH_THIRD_TAG if self.third_tag else TWO_TAGS


def main_run(model: str, options: Options, name: str = "main") -> Run:
    """The run of a model."""
    return Run(f"{name}/{label(model)}", TextRules(options.fractions), options, model)


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    models = models_of(repetitions[0].preset, options)
    rows = {
        label(model): Scores(run_stages(repetitions, main_run(model, options), model))
        for model in models
    }
    findings = [
        finding
        for head, scores in rows.items()
        for finding in (*found(head, scores), *levels(head, scores))
    ]
    return Outcome(
        TITLE,
        tables("", rows),
        findings,
        [
            "Exact match of greedy answers. After the first stage a held-out question of each "
            "entity is asked, after the second all questions of entities that had only a "
            "definition; the level of chance is that of entities that are never seen.",
            *notes(rows),
        ],
        paper=PAPER,
        over_seeds=True,
    )


def tables(where: str, rows: dict[str, Scores]) -> list[Table]:
    """After either stage."""
    return [
        table(f"Exact match after the first stage{where}", FIRST_TESTS, rows),
        table(f"Exact match after the second stage{where}", SECOND_TESTS, rows),
    ]


def found(where: str, scores: Scores) -> list[Finding]:
    """What the paper says of both stages, held against the scores."""
    return [
        *more(WEAK_CLAIM, where, scores, WEAK),
        *more("a right definition with tag 1 helps", where, scores, (WEAK[0], "q")),
        *more("a wrong definition with tag 2 hurts", where, scores, ("q", WEAK[1])),
        *more(STRONG_CLAIM, where, scores, STRONG),
    ]


def levels(where: str, scores: Scores) -> list[Finding]:
    """What the paper says of entities without definitions."""
    of_names = ("q_no_replacement_baseline", "q")
    learnt = named_pairs(scores, ("q", NEVER_SEEN))
    claim = "what is never seen is answered above 0 by guessing"
    return [
        *none("names and variables are answered alike", where, scores, of_names, learnt),
        *(larger_over_seeds(claim, where, *pair) for pair in with_zero(scores, NEVER_SEEN)),
    ]


def notes(rows: dict[str, Scores]) -> list[str]:
    """How many seeds would show what was found."""
    pairs = {"weak": WEAK, "strong": STRONG}
    return power_notes(
        {
            f"{kind} internalisation, {head}": scores.gap(pair)
            for head, scores in rows.items()
            for kind, pair in pairs.items()
        }
    )
