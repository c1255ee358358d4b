"""Table 4: linearised fine-tuning, on the tangent of the model at its own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.fields import Config
from ..report.findings import Finding
from ..report.outcome import Outcome
from . import paper
from .by_task import above
from .context import IclContext
from .methods import FT, LINEARISED
from .similarities import (
    SIM_AM,
    SIM_AM_DELTA,
    SIM_AOU,
    VECTOR,
    Row,
    similarity_outcome,
    similarity_tables,
)

TITLE = "ICL and fine-tuning, Table 4: linearised fine-tuning"
LINEAR = "linearised FT"
PUBLISHED = {
    SIM_AOU: {
        VECTOR: paper.SIM_AOU["noise"],
        "FT": paper.SIM_AOU["ft"],
        LINEAR: paper.LINEARISED_SIM_AOU,
    },
    SIM_AM: {
        "ZSL": paper.SIM_AM["zsl"],
        "FT": paper.SIM_AM["ft"],
        LINEAR: paper.LINEARISED_SIM_AM,
    },
}

LOGGED = {SIM_AM_DELTA: {"FT": paper.LOGGED_SIM_AM_DELTA["ft"]}}


@dataclass(frozen=True)
class Options(Config):
    """The section ``[table4]``: the names of the tasks."""

    tasks: tuple[str, ...]


def run(repetitions: Sequence[IclContext], options: Options) -> Outcome:
    """Measures; every seed is a repetition."""
    methods = {"FT": Row(FT), LINEAR: Row(LINEARISED)}
    tables = similarity_tables(repetitions, options.tasks, methods, PUBLISHED)
    findings: list[Finding] = []
    for where, of_point in tables.items():
        outputs = of_point[SIM_AOU]
        claim = f"{LINEAR}'s SimAOU is above a random vector's, at the {where}"
        findings += above(claim, outputs, LINEAR, VECTOR)
        claim = f"{LINEAR}'s SimAOU is below FT's, at the {where}"
        findings += above(claim, outputs, "FT", LINEAR)
    notes = [
        "Linearised: f(x; θ₀) + J(x)(θ − θ₀) for all that is recorded and for the logits that it "
        "learns from, the same loss, rate and order.",
    ]
    return similarity_outcome(TITLE, tables, findings, notes, repetitions, options.tasks, LOGGED)
