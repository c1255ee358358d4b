"""Table 3: layer-causal fine-tuning with its gradients clipped, and one layer after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config.fields import Config, check_numbers
from ..report.cells import Cell
from ..report.findings import Finding
from ..report.outcome import Outcome, Table
from . import paper
from .by_task import above
from .context import IclContext
from .methods import CLIPPED_L2, CLIPPED_MAX, IN_TURN, LAYER_CAUSAL
from .similarities import (
    SIM_AM,
    SIM_AM_DELTA,
    SIM_AOU,
    Row,
    similarity_outcome,
    similarity_tables,
)

TITLE = "ICL and fine-tuning, Table 3: layer-causal fine-tuning, clipped"
CAUSAL, TURNS = "layer-causal FT", "one layer after another"
L2, MAX = "clipped by the L2 norm", "clipped by the ℓ∞ norm"
LOGGED = {
    SIM_AOU: {L2: paper.LOGGED_CLIPPED_SIM_AOU},
    SIM_AM: {L2: paper.LOGGED_CLIPPED_SIM_AM},
    SIM_AM_DELTA: {CAUSAL: paper.LOGGED_SIM_AM_DELTA["layer_causal"]},
}


@dataclass(frozen=True)
class Options(Config):
    """The section ``[table3]``.

    Attributes:
        tasks: their names.
        clip: the norm of a step's gradient that is not exceeded.
        margin: the loss of SimAOU, as a cosine, at which it still counts as kept.
    """

    tasks: tuple[str, ...]
    clip: float
    margin: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "clip", "margin", above_zero=True)


def run(repetitions: Sequence[IclContext], options: Options) -> Outcome:
    """Measures; every seed is a repetition."""
    methods = {
        CAUSAL: Row(LAYER_CAUSAL),
        TURNS: Row(IN_TURN),
        L2: Row(CLIPPED_L2, clip=options.clip),
        MAX: Row(CLIPPED_MAX, clip=options.clip),
    }
    published = {
        SIM_AOU: {CAUSAL: paper.SIM_AOU["layer_causal"], L2: paper.CLIPPED_SIM_AOU},
        SIM_AM: {CAUSAL: paper.SIM_AM["layer_causal"], L2: paper.CLIPPED_SIM_AM},
    }
    tables = similarity_tables(repetitions, options.tasks, methods, published)
    idle = {row: never_clipped(tables, row) for row in (L2, MAX)}
    findings: list[Finding] = []
    for where, of_point in tables.items():
        for row in (L2, MAX):
            claim = f"{row} at {options.clip:g}, SimAM rises, at the {where}"
            of_row = above(claim, of_point[SIM_AM], row, CAUSAL)
            claim = f"{row} at {options.clip:g}, SimAOU is kept, at the {where}"
            of_row += above(claim, of_point[SIM_AOU], row, CAUSAL, options.margin)
            findings += [each for each in of_row if each.where not in idle[row]]
    notes = [
        *(
            f"{row} at {options.clip:g} is layer-causal FT itself on {', '.join(idle[row])}: no "
            "step's gradient is larger, so nothing is clipped and there is nothing to find."
            for row in idle
            if idle[row]
        ),
        f"A step's gradient is scaled down to a norm of {options.clip:g} over all weights that "
        "move, if its norm is larger. The paper calls its norm ℓ∞; its code takes L2, and so its "
        "numbers stand there.",
        "One layer after another, as the paper's text has it: a layer moves before its output "
        "goes on to the next; in all other rows all layers take one step at once.",
    ]
    return similarity_outcome(TITLE, tables, findings, notes, repetitions, options.tasks, LOGGED)


def never_clipped(tables: Mapping[str, Mapping[str, Table]], row: str) -> list[str]:
    """The columns whose every number, of all seeds and examples, is without the clip what it is
    with it, to the bit.
    """
    every = [table for of_point in tables.values() for table in of_point.values()]
    return [
        column
        for index, column in enumerate(every[0].columns)
        if all(_same(table.rows[row][index], table.rows[CAUSAL][index]) for table in every)
    ]


def _same(one: Cell | None, other: Cell | None) -> bool:
    assert one is not None and other is not None
    of_seeds = zip(one.values, other.values, strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in of_seeds)
