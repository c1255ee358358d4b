"""An experiment from its stages to its JSON, Markdown and figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..report.write import write_report
from . import EXPERIMENTS
from .context import ExperimentContext


def run_experiment(name: str, repetitions: Sequence[ExperimentContext]) -> Path:
    """Does what is left to do of an experiment; writes its JSON, Markdown and figure.

    Args:
        name: a key of ``EXPERIMENTS``.
        repetitions: one for every seed, from ``experiment_contexts``.

    Returns:
        The Markdown file.
    """
    preset = repetitions[0].preset
    experiment, seeds = EXPERIMENTS[name], preset.seeds_of(name)
    repetitions = [ctx for ctx in repetitions if ctx.seed in seeds]
    outcome = experiment.run(repetitions, preset.section(name, experiment.options))
    return write_report(name, outcome, repetitions, preset.sections, repetitions[0].fingerprint)
