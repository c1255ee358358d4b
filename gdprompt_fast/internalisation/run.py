"""An experiment from its stages to its JSON, Markdown and figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError
from ..report.write import write_report
from . import EXPERIMENTS
from .context import Context, fingerprint_of
from .preset import NUMBERS, Preset

FROM_SCRATCH = "from scratch"


def is_from_scratch(name: str, preset: Preset) -> bool:
    """Whether an experiment begins with no pretrained model."""
    options = preset.section(name, EXPERIMENTS[name].options)
    return name in ("number-lists", "mnist") or getattr(options, "source", "") == NUMBERS


def run_experiment(name: str, repetitions: Mapping[int, Context]) -> Path:
    """Does what is left to do of an experiment; writes its JSON, Markdown and figure.

    Args:
        name: a key of ``EXPERIMENTS``.
        repetitions: by seed, from ``contexts``.

    Returns:
        The Markdown file.
    """
    preset = next(iter(repetitions.values())).preset
    experiment, seeds = EXPERIMENTS[name], preset.seeds_of(name)
    options = preset.section(name, experiment.options)
    chosen = [repetitions[seed] for seed in seeds]
    chosen[0].used.clear()  # of the experiment before it
    outcome = experiment.run(chosen, options)
    fingerprint, sections = None, dict(preset.sections)
    if is_from_scratch(name, preset):
        sections["model"] = sections["model"] | {"name": FROM_SCRATCH}
    else:
        one = getattr(options, "pretrained", None) or preset.model.name
        models = getattr(options, "models", ()) or (one,)
        sections["model"] = sections["model"] | {"name": ", ".join(models)}
        fingerprint = _fingerprints(models, preset)
    return write_report(name, outcome, chosen, sections, fingerprint)


def _fingerprints(models: tuple[str, ...], preset: Preset) -> str:
    own, revision = preset.model.name, preset.model.revision
    try:
        return ", ".join(fingerprint_of(each, revision if each == own else None) for each in models)
    except UserError:  # the stages are there; the model may be gone
        return "unknown"
