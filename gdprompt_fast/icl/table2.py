"""Table 2: how alike are the states of ICL and of fine-tuned models?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.fields import Config
from ..report.findings import Finding
from ..report.outcome import Outcome
from . import paper
from .by_task import above
from .context import IclContext
from .methods import FT, LAYER_CAUSAL
from .similarities import (
    SIM_AM,
    SIM_AM_DELTA,
    SIM_AOU,
    UNTRAINED_FT,
    UPDATE,
    VECTOR,
    Row,
    similarity_outcome,
    similarity_tables,
)

TITLE = "ICL and fine-tuning, Table 2: similarity of attention's outputs and scores"
CAUSAL = "layer-causal FT"
PUBLISHED = {
    SIM_AOU: {
        VECTOR: paper.SIM_AOU["noise"],
        "FT": paper.SIM_AOU["ft"],
        CAUSAL: paper.SIM_AOU["layer_causal"],
    },
    SIM_AM: {
        "ZSL": paper.SIM_AM["zsl"],
        "FT": paper.SIM_AM["ft"],
        CAUSAL: paper.SIM_AM["layer_causal"],
    },
}

LOGGED = {
    SIM_AOU: {UNTRAINED_FT: paper.LOGGED_UNTRAINED_SIM_AOU},
    SIM_AM_DELTA: {
        "FT": paper.LOGGED_SIM_AM_DELTA["ft"],
        CAUSAL: paper.LOGGED_SIM_AM_DELTA["layer_causal"],
        UNTRAINED_FT: paper.LOGGED_UNTRAINED_SIM_AM_DELTA,
    },
}


@dataclass(frozen=True)
class Options(Config):
    """The section ``[table2]``: the names of the tasks."""

    tasks: tuple[str, ...]


def run(repetitions: Sequence[IclContext], options: Options) -> Outcome:
    """Measures; every seed is a repetition."""
    methods = {"FT": Row(FT), CAUSAL: Row(LAYER_CAUSAL)}
    tables = similarity_tables(repetitions, options.tasks, methods, PUBLISHED)
    findings: list[Finding] = []
    for where, of_point in tables.items():
        outputs, scores = of_point[SIM_AOU], of_point[SIM_AM]
        for high, low, than in (
            ("FT", VECTOR, "a random vector's"),
            ("FT", UPDATE, "a random update's"),
            ("FT", UNTRAINED_FT, "an untrained model's"),
            (CAUSAL, "FT", "FT's"),
        ):
            claim = f"{high}'s SimAOU is above {than}, at the {where}"
            findings += above(claim, outputs, high, low)
        findings += above(f"FT's SimAM is above ZSL's, at the {where}", scores, "FT", "ZSL")
        claim = f"{CAUSAL}'s SimAM is below FT's, at the {where}"
        findings += above(claim, scores, "FT", CAUSAL)
    notes = [
        "Layer-causal FT takes one step a demonstration on the sum of all layers' losses, as the "
        "paper's code does.",
    ]
    return similarity_outcome(TITLE, tables, findings, notes, repetitions, options.tasks, LOGGED)
