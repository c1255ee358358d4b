"""An experiment from its stages to its JSON, Markdown and figure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ..artifacts.files import read_json, write_file, write_json, write_whole
from ..errors import UserError
from ..report import draw_charts, draw_tables, experiment_markdown
from . import EXPERIMENTS
from .context import ExperimentContext
from .versions import versions


def is_experiment(path: Path) -> bool:
    """Whether a file is of those that :func:`run_experiment` wrote: beside a JSON that says so."""
    try:
        content = read_json(path.with_suffix(".json"))
    except (OSError, UserError):
        return False
    return content.get("experiment") == path.stem


def run_experiment(name: str, repetitions: Sequence[ExperimentContext]) -> Path:
    """Does what is left to do of an experiment; writes its JSON, Markdown and figure.

    Args:
        name: a key of ``EXPERIMENTS``.
        repetitions: one for every seed, from ``experiment_contexts``.

    Returns:
        The Markdown file.
    """
    output, preset = repetitions[0].output, repetitions[0].preset
    experiment, seeds = EXPERIMENTS[name], preset.seeds_of(name)
    repetitions = [ctx for ctx in repetitions if ctx.seed in seeds]
    outcome = experiment.run(repetitions, preset.section(name, experiment.options))
    content = {"experiment": name, **outcome.to_json(), **_circumstances(repetitions)}
    write_json(output / f"{name}.json", content)
    charts = content["charts"]
    draw = partial(draw_charts, charts) if charts else partial(draw_tables, content["tables"])
    write_whole(output / f"{name}.png", draw)
    markdown = output / f"{name}.md"
    write_file(markdown, experiment_markdown(content, f"{name}.png"))
    return markdown


def _circumstances(repetitions: Sequence[ExperimentContext]) -> dict[str, Any]:
    """How the numbers came about."""
    preset = repetitions[0].preset
    seeds = {f"seed-{ctx.seed}" for ctx in repetitions}
    used = repetitions[0].used.items()
    stages = {name: stage for name, stage in used if name.split("/")[0] in seeds}
    return {
        "settings": preset.sections,
        "model": repetitions[0].fingerprint,
        "seeds": [ctx.seed for ctx in repetitions],
        "device": ", ".join(sorted({stage.versions["device"] for stage in stages.values()})),
        "versions": versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": sum(stage.seconds for stage in stages.values()),
        "stages": {
            name: {"seconds": stage.seconds, "versions": stage.versions, **_counts(stage.result)}
            for name, stage in stages.items()
        },
    }


def _counts(result: dict[str, Any]) -> dict[str, Any]:
    """What a stage says of numbers of examples and steps."""
    return {name: result[name] for name in ("counts", "examples", "steps") if name in result}
