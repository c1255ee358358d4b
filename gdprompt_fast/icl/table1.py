"""Table 1: accuracy, and how far fine-tuning and ICL change the same answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..config.fields import Config
from ..report.outcome import Outcome
from . import paper
from .by_task import CONTROLS_NOTE, UNDEFINED, Rows, Values, above, by_task
from .context import BASE, UNTRAINED, IclContext
from .methods import FT, LAYER_CAUSAL
from .metrics import RATIOS, Answers, Ratio
from .similarities import CONTROLS, UPDATE, Row
from .stages import before_method, compared

TITLE = "ICL and fine-tuning, Table 1: accuracy, and answers that both change"
METHODS = {"FT": Row(FT), "layer-causal FT": Row(LAYER_CAUSAL), **CONTROLS}


@dataclass(frozen=True)
class Options(Config):
    """The section ``[table1]``: the names of the tasks."""

    tasks: tuple[str, ...]


def run(repetitions: Sequence[IclContext], options: Options) -> Outcome:
    """Measures; every seed is a repetition."""
    tasks = options.tasks
    accuracy = by_task(
        "Accuracy",
        repetitions,
        tasks,
        _accuracies(),
        {"ZSL": paper.TABLE1["zsl"], "FT": paper.TABLE1["ft"], "ICL": paper.TABLE1["icl"]},
    )
    published = {
        "Jaccard": paper.TABLE1["jaccard"],
        "Jaccard – correct": paper.TABLE1["correct"],
        "Jaccard – incorrect": paper.TABLE1["incorrect"],
    }
    ratios = {_head(name, "FT"): _ratio(of, "FT") for name, of in RATIOS.items()}
    for row in [each for each in METHODS if each != "FT"]:
        for name in ("Jaccard", "Rec2FTP"):
            ratios[_head(name, row)] = _ratio(RATIOS[name], row)
    jaccard = by_task("Answers changed by ICL and by FT", repetitions, tasks, ratios, published)
    changes = by_task("Share of examples whose answer changes", repetitions, tasks, _changes())
    findings = [
        *above("ICL sets more answers right than FT", changes, "ICL, to right", "FT, to right"),
        *above(
            "most of what FT sets right ICL does too, and not the other way round: "
            "Rec2FTP is above Jaccard",
            jaccard,
            "Rec2FTP",
            "Jaccard",
        ),
        *above(
            "FT changes the same answers as ICL, more than a random update does",
            jaccard,
            "Jaccard",
            _head("Jaccard", UPDATE),
        ),
    ]
    notes = [
        "Jaccard: of the answers that ICL or FT changes from ZSL's, the share that both change to "
        "the same one; correct: changes from wrong to right; incorrect: those that end wrong. "
        "Rec2FTP: of the answers that FT sets right, the share that ICL answers right.",
        "The standard error of a ratio is that of the delta method over examples, or over seeds.",
        UNDEFINED,
        CONTROLS_NOTE,
    ]  # fmt: skip
    return Outcome(TITLE, [accuracy, jaccard, changes], findings, notes, paper=paper.PAPER)


def answers(ctx: IclContext, task: str, row: str) -> Answers:
    """Of a row of ``METHODS``, beside ZSL and ICL of its model."""
    its = METHODS[row]
    return compared(ctx, task, its.method(ctx, task), its.which).answers


def _head(ratio: str, row: str) -> str:
    return ratio if row == "FT" else f"{ratio}, {row}"


def _accuracies() -> Rows:
    def right(row: str, of: Callable[[Answers], Tensor]) -> Values:
        return lambda ctx, task: _shares(of(given := answers(ctx, task, row)) == given.gold)

    def of_reference(which: str, of: Callable[[Answers], Tensor]) -> Values:
        def values(ctx: IclContext, task: str) -> list[float]:
            given = before_method(ctx, task, which).answers
            return _shares(of(given) == given.gold)

        return values

    return {
        "ZSL": of_reference(BASE, lambda each: each.zsl),
        "FT": right("FT", lambda each: each.ft),
        "ICL": of_reference(BASE, lambda each: each.icl),
        **{row: right(row, lambda each: each.ft) for row in METHODS if row != "FT"},
        "control: untrained model, ZSL": of_reference(UNTRAINED, lambda each: each.zsl),
        "control: untrained model, ICL": of_reference(UNTRAINED, lambda each: each.icl),
    }


def _ratio(of: Callable[[Answers], Ratio], row: str) -> Values:
    return lambda ctx, task: of(answers(ctx, task, row)).values


def _changes() -> Rows:
    def values(of: Callable[[Answers], Tensor]) -> Values:
        return lambda ctx, task: _shares(of(answers(ctx, task, "FT")))

    return {
        "ICL": values(lambda each: each.icl != each.zsl),
        "FT": values(lambda each: each.ft != each.zsl),
        "ICL, to right": values(lambda each: each.to_right(each.icl)),
        "FT, to right": values(lambda each: each.to_right(each.ft)),
    }


def _shares(counts: Tensor) -> list[float]:
    return [float(each) for each in counts]
