"""The paper's experiments, each one command: stages that are kept, and a report at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import figure2, table1, table2, table3, table4, table5
from .lab import Lab, make_labs
from .preset import Preset
from .results import Outcome
from .stages import StaleStage

__all__ = ["EXPERIMENTS", "Experiment", "Lab", "Outcome", "Preset", "StaleStage", "make_labs"]


@dataclass(frozen=True)
class Experiment:
    """An experiment: what its section of a preset says, and what it does."""

    settings: type
    run: Callable[[Sequence[Lab], Any], Outcome]


EXPERIMENTS = {
    module.__name__.rpartition(".")[2]: Experiment(module.Settings, module.run)
    for module in (figure2, table1, table2, table3, table4, table5)
}
