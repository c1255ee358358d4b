"""Both stages' texts at once: is strong internalisation larger than in two stages?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..report.findings import Finding
from ..report.outcome import Outcome
from ..report.over_seeds import NamedSeeds, larger_over_seeds
from . import main
from .context import Context
from .main import FIRST_TESTS, SECOND_TESTS, found, main_run, notes
from .measured import PAPER, STRONG, Scores, label, models_of, table
from .preset import Preset
from .runs import Run, run_stage
from .sources import check_source, check_two_stages

TITLE = "All texts in one stage"


@dataclass(frozen=True)
class Options(main.Options):
    """The section ``[joint]``.

    Attributes:
        two_stages: whether the two stages of ``main`` are run for these seeds, to compare.
    """

    two_stages: bool = True


def check(preset: Preset, options: Options) -> None:
    """
    Raises:
        UserError: if there is no table of people, or a stage of training is not said.
    """
    check_two_stages(preset, options)
    check_source(preset, options.source, options.lists, "joint")


def _in_two(preset: Preset, options: Options, model: str) -> Run:
    """The run to compare with: that of ``[main]``, if it is of the same source."""
    theirs = preset.section("main", main.Options)
    if theirs.source == options.source:
        return main_run(model, theirs)
    return main_run(model, options, "joint-in-two-stages")


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    rows: dict[str, Scores] = {}
    findings: list[Finding] = []
    preset = repetitions[0].preset
    for model in models_of(preset, options):
        at_once = replace(main_run(model, options, "joint"), joint=True)
        joint = Scores([run_stage(ctx, at_once) for ctx in repetitions], joint=True)
        rows[f"{label(model)}, one stage"] = joint
        findings += found(f"{label(model)}, one stage", joint)
        if not options.two_stages:
            continue
        two = Scores([run_stage(ctx, _in_two(preset, options, model)) for ctx in repetitions])
        rows[f"{label(model)}, two stages"] = two
        large, small = (each.gap(STRONG) for each in (joint, two))
        if large is not None and small is not None:
            claim = "strong internalisation is larger in one stage than in two"
            named = (NamedSeeds("one stage", large), NamedSeeds("two stages", small))
            findings.append(larger_over_seeds(claim, label(model), *named))
    tables = [
        table("Exact match, entities with questions", FIRST_TESTS, rows),
        table("Exact match, entities with a definition alone, or nothing", SECOND_TESTS, rows),
    ]
    about = "Exact match of greedy answers, all of one model after its last epoch."
    return Outcome(TITLE, tables, findings, [about, *notes(rows)], paper=PAPER, over_seeds=True)
