"""``gdprompt experiment``: what has to be right before the long work begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..artifacts.files import is_empty, write_folder
from ..artifacts.outputs import Outputs
from ..loading import choose_device
from ..presets import load_preset
from . import EXPERIMENTS, Preset, make_labs
from .lab import STAGES
from .run import is_experiment, run_experiment

OWN_PRESETS = ("small", "paper")


def prepare_experiment(
    name: str,
    preset: str,
    output: Path,
    seeds: Sequence[int] | None,
    model: str | None,
    device: str,
    outputs: Outputs,
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
        outputs: what must not be written over.
        revision: of the model on the hub; None: the preset's.
        allow_missing: as ``load_model`` takes it.

    Raises:
        ValueError: naming the option or the preset's section, what was expected and what was given.
    """
    foreign = not (output / STAGES).is_dir() and not is_empty(output)
    if foreign:
        outputs.check_folder(output)
    else:
        for file in (output / f"{name}{suffix}" for suffix in (".json", ".md", ".png")):
            if file.exists():
                outputs.check_file(file.name, file, is_experiment)
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

    if foreign:
        write_folder(output, lambda folder: (folder / STAGES).mkdir())

    def work() -> None:
        markdown = run_experiment(name, labs)
        print(f"\n{markdown.read_text(encoding='utf-8')}\nwritten to {markdown.parent}")

    return work
