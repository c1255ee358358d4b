"""Table 3: layer-causal fine-tuning with its gradients clipped, and one layer after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.fields import Config, check_numbers
from ..report.findings import Finding
from ..report.outcome import Outcome
from . import paper
from .by_task import above
from .context import IclContext
from .methods import CLIPPED_L2, CLIPPED_MAX, IN_TURN, LAYER_CAUSAL
from .similarities import SIM_AM, SIM_AOU, Row, similarity_outcome, similarity_tables

TITLE = "ICL and fine-tuning, Table 3: layer-causal fine-tuning, clipped"
CAUSAL, TURNS = "layer-causal FT", "one layer after another"
L2, MAX = "clipped by the L2 norm", "clipped by the ℓ∞ norm"


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
    findings: list[Finding] = []
    for where, of_point in tables.items():
        for row in (L2, MAX):
            claim = f"{row} at {options.clip:g}, SimAM rises, at the {where}"
            findings += above(claim, of_point[SIM_AM], row, CAUSAL)
            claim = f"{row} at {options.clip:g}, SimAOU is kept, at the {where}"
            findings += above(claim, of_point[SIM_AOU], row, CAUSAL, options.margin)
    notes = [
        f"A step's gradient is scaled down to a norm of {options.clip:g} over all weights that "
        "move, if its norm is larger. The paper calls its norm ℓ∞; its code takes L2, and so its "
        "numbers stand there.",
        "One layer after another, as the paper's text has it: a layer moves before its output "
        "goes on to the next; in all other rows all layers take one step at once.",
    ]
    return similarity_outcome(TITLE, tables, findings, notes, repetitions, options.tasks)
