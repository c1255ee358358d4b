"""The paper's experiments, each one command: stages that are kept, and a report at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..artifacts.stage import StaleStage
from ..report.outcome import Outcome
from . import figure2, kept, second_order, table1, table2, table3, table4, table5
from .context import ExperimentContext, experiment_contexts
from .preset import Preset
from .variants import Variant

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "ExperimentContext",
    "Outcome",
    "Preset",
    "StaleStage",
    "experiment_contexts",
]


@dataclass(frozen=True)
class Experiment:
    """An experiment: what its section of a preset says, what else must hold, and what it does.

    Attributes:
        variants: the models that it compares.
        check: raises a ValueError before any work if the preset does not do.
    """

    options: type
    run: Callable[[Sequence[ExperimentContext], Any], Outcome]
    variants: Callable[[Preset, Any], list[Variant]]
    check: Callable[[Preset, Any], None]


def _nothing_else(preset: Preset, settings: Any) -> None:
    """What most experiments ask of a preset beyond its sections."""


EXPERIMENTS = {
    module.__name__.rpartition(".")[2].replace("_", "-"): Experiment(
        module.Options, module.run, module.variants, getattr(module, "check", _nothing_else)
    )
    for module in (figure2, table1, table2, table3, table4, table5, kept, second_order)
}
