"""Experiments of a second paper: do models internalise more of what looks reliable?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..report.outcome import Outcome
from . import (
    alignment,
    alpha,
    attribution,
    batch_size,
    data_amount,
    joint,
    main,
    meta,
    mnist,
    number_lists,
    trex,
    word_order,
)
from .context import Context, contexts
from .preset import Preset
from .sources import check_two_stages

__all__ = ["EXPERIMENTS", "Context", "Experiment", "Preset", "contexts"]


@dataclass(frozen=True)
class Experiment:
    """An experiment: what its section of a preset says, what else must hold, and what it does.

    Attributes:
        check: raises a UserError before any work if the preset does not do.
    """

    options: type[Any]
    run: Callable[[Sequence[Context], Any], Outcome]
    check: Callable[[Preset, Any], None]


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2].replace("_", "-")


EXPERIMENTS = {
    _name(module): Experiment(
        module.Options, module.run, getattr(module, "check", check_two_stages)
    )
    for module in (
        *(main, trex, joint, attribution, alpha, word_order, batch_size, data_amount),
        *(number_lists, mnist, alignment, meta),
    )
}
