"""Tables of similarities: a row for every method and control, at both points of a row of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..report.findings import Finding
from ..report.outcome import Outcome, Table
from . import paper
from .blocks import blocks_of, known_family
from .by_task import (
    CONTROLS_NOTE,
    COSINE,
    UNDEFINED,
    Measure,
    PaperRows,
    Rows,
    beside_logs,
    by_task,
    mean_of,
    sizes,
)
from .context import BASE, UNTRAINED, IclContext
from .methods import FT, RANDOM, RATE_0, Method
from .observing import POINTS
from .stages import before_method, compared

SIM_AOU, SIM_AM, SIM_AM_DELTA = "SimAOU", "SimAM", "SimAM_Δ"
METRICS = {SIM_AOU: "sim_aou", SIM_AM: "sim_am", SIM_AM_DELTA: "sim_am_delta"}
VECTOR, UPDATE = "control: random vector", "control: random update"
UNTRAINED_FT = "control: untrained model, FT"
WHAT = (
    "SimAOU: mean cosine, over layers and examples, of what ICL and FT change in attention's "
    "outputs, each divided by its length. SimAM: mean cosine, over layers, heads and examples, of "
    "ICL's raw attention scores on the query's text with ZSL's or FT's. SimAM_Δ: of what the two "
    "change in them."
)


@dataclass(frozen=True)
class Row:
    """A method, the model that it is applied to, and the norm its gradients are clipped at."""

    kind: str
    which: str = BASE
    clip: float = 0.0

    def method(self, ctx: IclContext, task: str) -> Method:
        """With the task's rate and a repetition's seed."""
        lr = 0.0 if self.kind == RATE_0 else ctx.preset.tasks[task].lr
        return Method(self.kind, lr, self.clip, ctx.seed)


CONTROLS = {
    UPDATE: Row(RANDOM),
    "control: FT at rate 0": Row(RATE_0),
    UNTRAINED_FT: Row(FT, UNTRAINED),
}


def similarity_tables(
    repetitions: Sequence[IclContext],
    tasks: Sequence[str],
    methods: Mapping[str, Row],
    published: Mapping[str, PaperRows],
) -> dict[str, dict[str, Table]]:
    """By point and metric, the methods' rows and the controls'.

    Args:
        published: the paper's numbers by metric; they are at the candidate's token.
    """
    return {
        where: {
            name: by_task(
                f"{name}, at the {where}",
                repetitions,
                tasks,
                _rows(name, point, methods),
                published.get(name) if point == 0 else None,
                COSINE,
            )
            for name in METRICS
        }
        for point, where in enumerate(POINTS)
    }


def _rows(name: str, point: int, methods: Mapping[str, Row]) -> Rows:
    before: dict[str, Measure] = {}
    if name == SIM_AOU:
        before = {VECTOR: _without_method("sim_aou", point, BASE)}
    elif name == SIM_AM:
        before = {
            "ZSL": _without_method("sim_am", point, BASE),
            "control: untrained model, ZSL": _without_method("sim_am", point, UNTRAINED),
        }
    rows = {**methods, **CONTROLS}
    return before | {head: _similarity(METRICS[name], point, row) for head, row in rows.items()}


def _similarity(metric: str, point: int, row: Row) -> Measure:
    def values(ctx: IclContext, task: str) -> list[float]:
        its = compared(ctx, task, row.method(ctx, task), row.which)
        return [float(each) for each in its.at_points[metric][:, point]]

    return mean_of(values)


def _without_method(metric: str, point: int, which: str) -> Measure:
    def values(ctx: IclContext, task: str) -> list[float]:
        its = before_method(ctx, task, which)
        return [float(each) for each in its.at_points[metric][:, point]]

    return mean_of(values)


def similarity_outcome(
    title: str,
    tables: Mapping[str, Mapping[str, Table]],
    findings: Sequence[Finding],
    notes: Sequence[str],
    repetitions: Sequence[IclContext],
    tasks: Sequence[str],
    logged: Mapping[str, PaperRows],
) -> Outcome:
    """What an experiment with these tables reports; the notes of its own come first.

    Args:
        logged: numbers of the code's logs by metric, at the candidate's token.
    """
    every = [table for of_point in tables.values() for table in of_point.values()]
    common = [WHAT, sizes(repetitions, tasks), UNDEFINED, CONTROLS_NOTE]
    common += rounding_note([repetitions[0].load(BASE)])
    common += [paper.SST5_NOTE] if "sst5" in tasks else []
    logs = beside_logs(tables[POINTS[0]], logged)
    return Outcome(title, every, findings, [*notes, *common], logs, paper=paper.PAPER)


def rounding_note(models: Sequence[nn.Module]) -> list[str]:
    """Of those whose positions are rotary, if there are any."""
    layers = sorted({len(blocks_of(each)) for each in models if known_family(each).rotary})
    if not layers:
        return []
    return [
        "Where positions are rotary, scores of the first layer follow from tokens and distances "
        f"alone: there ICL's are ZSL's but for rounding. So of {_or(layers)} layers whose mean "
        "SimAM and SimAM_Δ are, that one adds 1 to ZSL's sum in SimAM and the cosine with rounding "
        "noise to SimAM_Δ's: read SimAM_Δ as no finer than 1/layers."
    ]


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
