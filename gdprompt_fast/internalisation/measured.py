"""From scores of runs to numbers over seeds, tables and findings, as all experiments have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..artifacts.stage import Stage
from ..report.findings import Finding
from ..report.outcome import Paper, Table
from ..report.over_seeds import (
    POWER,
    NamedSeeds,
    OverSeeds,
    larger_over_seeds,
    none_over_seeds,
    seeds_needed,
)
from .context import Context
from .material.subsets import SUBSETS
from .preset import NUMBERS, Preset, RunOptions

PAPER = Paper(
    "(Out-of-context) Meta-learning in Language Models, draft of arXiv 2310.15047",
    "it has figures and no table of numbers, so signs and order are what is compared",
)
FIRST, SECOND = "first", "second"
WEAK = ("qd1consis", "qd2incons")
STRONG = ("d1consis", "d2consis")
STRONG_CLAIM = "strong internalisation: new definitions with tag 1 are learnt more than with tag 2"
NONE_WITHIN = 0.05  # a share: a difference whose interval is within this is none
WEAK_CLAIM = "weak internalisation: with tag 1, whose definitions are right, more is answered"


@dataclass(frozen=True)
class Scores:
    """The scores of a run for every seed.

    Attributes:
        stages: the run's stage, a seed each.
        joint: whether all was trained at once, so that all scores are of the first stage.
    """

    stages: Sequence[Stage]
    joint: bool = False

    def cell(self, test: str) -> OverSeeds | None:
        """The scores of a test set, of all second stages of a seed together; None without it."""
        rows = [self._of(stage, test) for stage in self.stages]
        if not all(rows):
            return None
        return OverSeeds(tuple(tuple(map(float, row)) for row in rows))

    def named(self, test: str) -> NamedSeeds:
        """The scores of a test set that there has to be."""
        cell = self.cell(test)
        assert cell is not None, test
        return NamedSeeds(head_of(test), cell)

    def gap(self, pair: tuple[str, str]) -> OverSeeds | None:
        """The difference of two test sets, one number a seed."""
        high, low = (self.cell(test) for test in pair)
        if high is None or low is None:
            return None
        return OverSeeds(tuple((value,) for value in high.differences(low)))

    def _of(self, stage: Stage, test: str) -> str:
        result = stage.result
        first: str = result[FIRST].get(test, "")
        if self.joint or test.startswith("q"):
            return first
        return "".join(each.get(test, "") for each in result[SECOND])


def head_of(test: str) -> str:
    """A test set in the paper's words."""
    name, _, word = test.partition(":")
    swapped = name.endswith("_swapped")
    known = SUBSETS.get(name.removesuffix("_swapped"))
    head = name if known is None else known.head
    ending = ", the definition's entity" if swapped else ""
    return f"{head}{ending}" + (f", “{word}”" if word else "")


def label(model: str) -> str:
    """A model's name without where it lies."""
    return Path(model).name


def models_of(preset: Preset, options: RunOptions) -> tuple[str, ...]:
    """The models that an experiment compares; of numbers, the one from scratch."""
    if options.source == NUMBERS:
        return (NUMBERS,)
    return options.models or (preset.model.name,)


def one_model(preset: Preset, options: RunOptions) -> str:
    """The model of an experiment that has one."""
    return models_of(preset, options)[0]


def table(title: str, tests: Sequence[str], rows: Mapping[str, Scores]) -> Table:
    """Exact match by test set, a row each; sets that no row has are left out."""
    cells = {head: [scores.cell(test) for test in tests] for head, scores in rows.items()}
    kept = [i for i in range(len(tests)) if any(row[i] is not None for row in cells.values())]
    return Table(
        title,
        [head_of(tests[i]) for i in kept],
        {head: [row[i] for i in kept] for head, row in cells.items()},
    )


def gaps(title: str, column: str, pair: tuple[str, str], rows: Mapping[str, Scores]) -> Table:
    """The difference of two test sets, a row each, between them."""
    return Table(
        title,
        [*map(head_of, pair), column],
        {
            head: [*(scores.cell(test) for test in pair), scores.gap(pair)]
            for head, scores in rows.items()
        },
    )


def named_pairs(
    scores: Scores, pair: tuple[str, str], ending: str = ""
) -> list[tuple[NamedSeeds, NamedSeeds]]:
    """Two test sets with their names, as a list of one; of none where one is not there."""
    if any(scores.cell(test) is None for test in pair):
        return []
    high, low = (scores.named(test) for test in pair)
    return [(replace(high, name=high.name + ending), replace(low, name=low.name + ending))]


def more(claim: str, where: str, scores: Scores, pair: tuple[str, str]) -> list[Finding]:
    """Whether the first of two test sets is answered more; nothing where one is not there."""
    return [larger_over_seeds(claim, where, *both) for both in named_pairs(scores, pair)]


def none(
    claim: str,
    where: str,
    scores: Scores,
    pair: tuple[str, str],
    controls: Sequence[tuple[NamedSeeds, NamedSeeds]],
) -> list[Finding]:
    """Whether two test sets are answered alike, given that something was learnt; nothing where one
    is not there.
    """
    return [
        none_over_seeds(claim, where, *both, NONE_WITHIN, controls)
        for both in named_pairs(scores, pair)
    ]


def with_zero(scores: Scores, test: str) -> list[tuple[NamedSeeds, NamedSeeds]]:
    """A test set and an exact match of 0, as a list of one; of none where it is not there."""
    if scores.cell(test) is None:
        return []
    zero = OverSeeds(((0.0,),) * len(scores.stages))
    return [(scores.named(test), NamedSeeds("nothing", zero))]


def power_notes(pairs: Mapping[str, OverSeeds | None]) -> list[str]:
    """How many seeds would show effects of the sizes found, a sentence each."""
    return [
        f"{name}: {seeds_in_words(cell.per_seed)}"
        for name, cell in pairs.items()
        if cell is not None and len(cell.values) > 1
    ]


def seeds_in_words(differences: Sequence[float]) -> str:
    """How many seeds show a difference of the mean and spread of these."""
    needed = seeds_needed(differences)
    if needed is None:
        return "the difference found is not above zero, so no number of seeds is named"
    return (
        f"{needed} seeds show a difference of the size and spread found with probability {POWER:g} "
        f"(one-sided t-test at 0.05); these are {len(differences)}"
    )


def of_seeds(repetitions: Sequence[Context]) -> str:
    """What the repetitions are, for notes."""
    return f"{len(repetitions)} seeds of material, first stage and order"
