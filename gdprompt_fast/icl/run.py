"""The experiments by name, and one from its stages to its JSON, Markdown and figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report.outcome import Outcome
from ..report.write import write_report
from . import attention, meta_trained, table1, table2, table3, table4
from .context import BASE, IclContext

FILES = "icl-"  # begins the names of an experiment's files, beside those of other papers


@dataclass(frozen=True)
class IclExperiment:
    """What an experiment's section of a preset says, and what it does.

    Attributes:
        check: raises a UserError before any work if something is not there or does not do.
    """

    options: type[Any]
    run: Callable[[Sequence[IclContext], Any], Outcome]
    check: Callable[[Sequence[IclContext], Any], None]


def _reads_its_tasks(repetitions: Sequence[IclContext], options: Any) -> None:
    repetitions[0].load(BASE)
    for ctx in repetitions:
        for task in options.tasks:
            ctx.prompts(task)


EXPERIMENTS = {
    module.__name__.rpartition(".")[2].replace("_", "-"): IclExperiment(
        module.Options, module.run, getattr(module, "check", _reads_its_tasks)
    )
    for module in (table1, table2, table3, table4, attention, meta_trained)
}


def run_icl(name: str, repetitions: Sequence[IclContext]) -> Path:
    """Does what is left to do of an experiment; writes its JSON, Markdown and figure.

    Args:
        name: a key of ``EXPERIMENTS``.
        repetitions: one for every seed, from ``icl_contexts``.

    Returns:
        The Markdown file.
    """
    preset, experiment = repetitions[0].preset, EXPERIMENTS[name]
    outcome = experiment.run(repetitions, preset.section(name, experiment.options))
    fingerprint = repetitions[0].fingerprint
    return write_report(f"{FILES}{name}", outcome, repetitions, preset.sections, fingerprint)
