"""Table 1: accuracy, and how far fine-tuning and ICL change the same answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..config.fields import Config
from ..report.outcome import Outcome
from . import paper
from .by_task import (
    CONTROLS_NOTE,
    UNDEFINED,
    Measure,
    PaperRows,
    above,
    beside_logs,
    by_task,
    mean_of,
    sizes,
)
from .context import BASE, UNTRAINED, IclContext
from .methods import FT, LAYER_CAUSAL
from .metrics import RATIOS, Answers, RatioCell, ratio_cell
from .similarities import CONTROLS, UPDATE, Row
from .stages import before_method, compared

TITLE = "ICL and fine-tuning, Table 1: accuracy, and answers that both change"
METHODS = {"FT": Row(FT), "layer-causal FT": Row(LAYER_CAUSAL), **CONTROLS}
CHANGED, SET_RIGHT = "Answers changed from ZSL's", "Answers set right"
MOST, MOST_FREQUENT = "The most frequent answer's share", "the most frequent label alone"
OF_WRONG = "ICL, of all that ZSL has wrong"
PUBLISHED = {
    "Jaccard": paper.TABLE1["jaccard"],
    "Jaccard – correct": paper.TABLE1["correct"],
    "Jaccard – incorrect": paper.TABLE1["incorrect"],
}
LOGGED = {
    "Rec2FTP": {
        "FT": paper.LOGGED_REC2FTP["ft"],
        "layer-causal FT": paper.LOGGED_REC2FTP["layer_causal"],
    }
}
WHAT = (
    "Jaccard: of the answers that ICL or FT changes from ZSL's, the share that both change to "
    "the same one; correct: changes from wrong to right; incorrect: those that end wrong. "
    "Rec2FTP: of the answers that FT sets right, the share that ICL answers right; beside it "
    "stands the share that ICL answers right of all that ZSL has wrong. These are of the counts "
    "of all seeds together, their standard errors the delta method's. "
    f"“{MOST}”: how far a method says the same of all queries."
)


@dataclass(frozen=True)
class Options(Config):
    """The section ``[table1]``: the names of the tasks."""

    tasks: tuple[str, ...]


def run(repetitions: Sequence[IclContext], options: Options) -> Outcome:
    """Measures; every seed is a repetition."""
    published = {head: paper.TABLE1[head.lower()] for head in ("ZSL", "FT", "ICL")}
    rows: dict[str, tuple[dict[str, Measure], PaperRows]] = {
        "Accuracy": (_rows(lambda its, labels: labels == its.gold), published)
    }
    rows["Accuracy"][0][MOST_FREQUENT] = mean_of(_most_frequent_label)
    for name in RATIOS:
        rows[name] = _ratios(name), {"FT": PUBLISHED[name]} if name in PUBLISHED else {}
    rows["Rec2FTP"][0][OF_WRONG] = _icl_of_wrong
    rows[MOST] = _rows(lambda its, labels: labels == labels.mode().values), {}
    rows[CHANGED] = _rows(lambda its, labels: labels != its.zsl, zsl=False), {}
    rows[SET_RIGHT] = _rows(lambda its, labels: its.to_right(labels), zsl=False), {}
    tables = {
        title: by_task(title, repetitions, options.tasks, *of_title)
        for title, of_title in rows.items()
    }
    accuracy = tables["Accuracy"]
    findings = [
        *above("ICL is right more often than ZSL", accuracy, "ICL", "ZSL"),
        *above("ICL is right more often than one label", accuracy, "ICL", MOST_FREQUENT),
        *above("ICL sets more answers right than FT", tables[SET_RIGHT], "ICL", "FT"),
        *above("what FT sets right ICL is right on more often than on all that ZSL has wrong",
               tables["Rec2FTP"], "FT", OF_WRONG),
        *above("FT's Jaccard is above a random update's", tables["Jaccard"], "FT", UPDATE),
    ]  # fmt: skip
    notes = [WHAT, sizes(repetitions, options.tasks), UNDEFINED, CONTROLS_NOTE]
    logs = beside_logs(tables, LOGGED)
    return Outcome(TITLE, list(tables.values()), findings, notes, logs, paper=paper.PAPER)


def _answers(ctx: IclContext, task: str, row: Row) -> Answers:
    return compared(ctx, task, row.method(ctx, task), row.which).answers


def _most_frequent_label(ctx: IclContext, task: str) -> list[float]:
    gold = before_method(ctx, task, BASE).answers.gold
    return [float(each) for each in gold == gold.mode().values]


def _icl_of_wrong(repetitions: Sequence[IclContext], task: str) -> RatioCell:
    its = [before_method(ctx, task, BASE).answers for ctx in repetitions]
    return ratio_cell([each.icl_of_wrong() for each in its])


def _ratios(name: str) -> dict[str, Measure]:
    def of(row: Row) -> Measure:
        return lambda repetitions, task: ratio_cell(
            [RATIOS[name](_answers(ctx, task, row)) for ctx in repetitions]
        )

    return {head: of(row) for head, row in METHODS.items()}


def _rows(count: Callable[[Answers, Tensor], Tensor], zsl: bool = True) -> dict[str, Measure]:
    """Shares of the answers that ``count``, by the labels of ZSL, ICL and every method.

    Args:
        zsl: whether ZSL has rows.
    """

    def reference(which: str, name: str) -> Measure:
        def values(ctx: IclContext, task: str) -> list[float]:
            its = before_method(ctx, task, which).answers
            return [float(each) for each in count(its, getattr(its, name))]

        return mean_of(values)

    def method(row: Row) -> Measure:
        def values(ctx: IclContext, task: str) -> list[float]:
            its = _answers(ctx, task, row)
            return [float(each) for each in count(its, its.ft)]

        return mean_of(values)

    names = ("zsl", "icl") if zsl else ("icl",)
    before = {name.upper(): reference(BASE, name) for name in names}
    methods = {head: method(row) for head, row in METHODS.items()}
    untrained = {
        f"control: untrained model, {name.upper()}": reference(UNTRAINED, name) for name in names
    }
    return before | methods | untrained
