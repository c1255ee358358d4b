"""An experiment from its stages to its JSON, Markdown and figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..loading import find_model, fingerprint_of
from ..report.write import write_report
from . import EXPERIMENTS
from .context import Context
from .preset import NUMBERS, Preset

FROM_SCRATCH = "from scratch"


def models_in(name: str, preset: Preset) -> dict[str, str | None]:
    """The pretrained models of an experiment, each with its revision; none from scratch."""
    options, own = preset.section(name, EXPERIMENTS[name].options), preset.model
    if name in ("number-lists", "mnist") or getattr(options, "source", "") == NUMBERS:
        return {}
    one = getattr(options, "pretrained", None) or own.name
    models = getattr(options, "models", ()) or (one,)
    return {each: own.revision if each == own.name else None for each in models}


def check_experiment(name: str, preset: Preset) -> None:
    """
    Raises:
        UserError: before any work, if the preset does not do for it, or a model is not there.
    """
    experiment = EXPERIMENTS[name]
    preset.seeds_of(name)
    experiment.check(preset, preset.section(name, experiment.options))
    for model, revision in models_in(name, preset).items():
        find_model(model, revision)


def run_experiment(name: str, repetitions: Mapping[int, Context]) -> Path:
    """Does what is left to do of an experiment; writes its JSON, Markdown and figure.

    Args:
        name: a key of ``EXPERIMENTS``.
        repetitions: by seed, from ``contexts``.

    Returns:
        The Markdown file.
    """
    preset = next(iter(repetitions.values())).preset
    experiment = EXPERIMENTS[name]
    chosen = [repetitions[seed] for seed in preset.seeds_of(name)]
    chosen[0].used.clear()  # of the experiment before it
    outcome = experiment.run(chosen, preset.section(name, experiment.options))
    models = models_in(name, preset)
    named = preset.sections["model"] | {"name": ", ".join(models) or FROM_SCRATCH}
    prints = ", ".join(fingerprint_of(find_model(*each).folder) for each in models.items())
    return write_report(name, outcome, chosen, {**preset.sections, "model": named}, prints or None)
