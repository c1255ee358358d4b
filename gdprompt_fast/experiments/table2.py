"""Table 2: one θ' adapted to several contexts, by a step on all at once or one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from . import paper
from .arms import Arm
from .cells import Cell
from .findings import Finding, Named, larger
from .lab import Lab
from .measure import Question, measure, measure_at_best
from .preset import METRICS, OBJECTIVES, Preset, check_choice
from .results import Outcome, PaperNumbers, Table

TITLE = "Table 2: several contexts in one model, accuracy after Fine-Tuning"
WAYS = {False: "batched", True: "one after another"}
BASE, BEST = "BM", "BM, best inner rate"

Way = tuple[int, bool]  # contexts that share a θ', and whether it is adapted to one after another


@dataclass(frozen=True)
class Settings:
    """The section ``[table2]``: the task, the objective, and the numbers of contexts over 1."""

    task: str
    objective: str
    contexts: tuple[int, ...]

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        if not self.contexts or min(self.contexts) < 2:
            raise UserError(f"contexts: expected integers >= 2, got {list(self.contexts)}")


def check(preset: Preset, settings: Settings) -> None:
    """Raises a ValueError if a batch cannot be divided into groups of so many contexts."""
    for contexts in settings.contexts:
        preset.train_options(settings.task, contexts=contexts)


def run(labs: Sequence[Lab], settings: Settings) -> Outcome:
    """Measures and compares; every seed is a lab."""
    task = labs[0].preset.tasks[settings.task]
    ways = [(1, False), *((k, way) for k in settings.contexts for way in WAYS)]
    arms = {
        _trained_on(k): Arm(settings.task, settings.objective, contexts=k)
        for k in (1, *settings.contexts)
    }
    tables, findings = [], []
    for metric in task.metrics:
        base = [_question(Arm(settings.task), way) for way in ways]
        rows = {
            BASE: [measure(labs, question, metric) for question in base],
            BEST: [measure_at_best(labs, question, metric)[0] for question in base],
        }
        for head, arm in arms.items():
            rows[head] = [measure(labs, _question(arm, way), metric) for way in ways]
        title = f"{task.label}, {METRICS[metric]}"
        is_first = metric == task.metrics[0]
        numbers = _paper(settings) if is_first else {}
        tables.append(Table(title, [_head(way) for way in ways], rows, numbers))
        if is_first:
            by_way = {head: dict(zip(ways, cells, strict=True)) for head, cells in rows.items()}
            findings = _findings(by_way, ways[1:])
    notes = [
        "Test examples in a seeded order; as many neighbours as there are contexts share one θ' "
        "and are all asked of it, so standard errors are those of the means of such groups.",
        "The paper's numbers for several contexts are those of updates one after another.",
    ]
    return Outcome(TITLE, tables, findings, notes)


def _question(arm: Arm, way: Way) -> Question:
    contexts, one_after_another = way
    return Question(arm, contexts=contexts, one_after_another=one_after_another)


def _findings(rows: dict[str, dict[Way, Cell]], ways: Sequence[Way]) -> list[Finding]:
    degrades = "a model trained on 1 context degrades with several"
    less = "training on as many contexts loses less"
    found = []
    single = rows[_trained_on(1)]
    for way in ways:
        at_one = Named(f"{_trained_on(1)}, {_head((1, False))}", single[1, False])
        at_many = Named(f"{_trained_on(1)}, {_head(way)}", single[way])
        several = Named(f"{_trained_on(way[0])}, {_head(way)}", rows[_trained_on(way[0])][way])
        found += [
            larger(degrades, _head(way), at_one, at_many),
            larger(less, _head(way), several, at_many),
        ]
    return found


def _paper(settings: Settings) -> PaperNumbers:
    if settings.task != paper.SQUAD:
        return {}
    return {
        **{(BASE, _head((k, k > 1))): number for k, number in paper.TABLE2_BASE.items()},
        **{(_trained_on(1), _head((k, k > 1))): n for k, n in paper.TABLE2_SINGLE.items()},
        **{(_trained_on(k), _head((k, True))): n for k, n in paper.TABLE2_MULTIPLE.items()},
    }


def _trained_on(contexts: int) -> str:
    return f"meta-trained on {contexts} context{'s' if contexts > 1 else ''}"


def _head(way: Way) -> str:
    contexts, one_after_another = way
    return "1 context" if contexts == 1 else f"{contexts} contexts, {WAYS[one_after_another]}"
