"""``gdprompt experiment``: what has to be right before the long work begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..loading import choose_device
from ..presets import load_preset
from . import EXPERIMENTS, Preset, make_labs
from .run import run_experiment

OWN_PRESETS = ("small", "paper")


def prepare_experiment(
    name: str,
    preset: str,
    output: Path,
    seeds: Sequence[int] | None,
    model: str | None,
    device: str,
    revision: str | None = None,
    allow_missing: bool = False,
) -> Callable[[], None]:
    """The long work of an experiment, with everything checked that can be beforehand.

    Args:
        name: a key of ``EXPERIMENTS``.
        preset: ``small``, ``paper`` or a file.
        output: the folder of results and stages, of this experiment and others.
        seeds: None: the preset's.
        model: None: the preset's.
        device: as ``choose_device`` takes it.
        revision: of the model on the hub; None: the preset's.
        allow_missing: as ``load_model`` takes it.

    Raises:
        ValueError: naming the option or the preset's section, what was expected and what was given.
    """
    sections = load_preset(f"experiments-{preset}" if preset in OWN_PRESETS else preset)
    general = dict(sections.get("model", {}))
    if model is not None:
        general.pop("revision", None)  # of the preset's own model
    overrides = {
        "seeds": None if seeds is None else list(seeds),
        "name": model,
        "revision": revision,
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    sections["model"] = general | given
    read = Preset.read(sections)
    experiment = EXPERIMENTS[name]
    experiment.check(read, read.section(name, experiment.settings))
    labs = make_labs(read, output, choose_device(device), allow_missing)

    def work() -> None:
        markdown = run_experiment(name, labs)
        print(f"\n{markdown.read_text(encoding='utf-8')}\nwritten to {markdown.parent}")

    return work
