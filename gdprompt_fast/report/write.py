"""What an experiment found, written: its JSON, Markdown and figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ..artifacts.files import read_json, write_file, write_json, write_whole
from ..errors import UserError
from .charts import draw_charts
from .experiment import draw_tables, experiment_markdown
from .outcome import Outcome
from .repetition import Repetition
from .versions import versions


def is_experiment(path: Path) -> bool:
    """Whether a file is of those that :func:`write_report` wrote: beside a JSON that says so."""
    try:
        content = read_json(path.with_suffix(".json"))
    except (OSError, UserError):
        return False
    return content.get("experiment") == path.stem


def write_report(
    name: str,
    outcome: Outcome,
    repetitions: Sequence[Repetition],
    settings: Mapping[str, Any],
    model: str | None,
) -> Path:
    """Writes ``NAME.json``, ``NAME.md`` and ``NAME.png`` to the repetitions' folder.

    Args:
        settings: everything that was chosen, ``settings["model"]["name"]`` among it.
        model: the fingerprint of the files of the model that everything begins with; None if it
            begins with none.

    Returns:
        The Markdown file.
    """
    output = repetitions[0].output
    content = {
        "experiment": name,
        **outcome.to_json(),
        "settings": settings,
        "model": model,
        **_circumstances(repetitions),
    }
    write_json(output / f"{name}.json", content)
    charts = content["charts"]
    draw = partial(draw_charts, charts) if charts else partial(draw_tables, content)
    write_whole(output / f"{name}.png", draw)
    markdown = output / f"{name}.md"
    write_file(markdown, experiment_markdown(content, f"{name}.png"))
    return markdown


def _circumstances(repetitions: Sequence[Repetition]) -> dict[str, Any]:
    """How the numbers came about."""
    seeds = {f"seed-{each.seed}" for each in repetitions}
    used = repetitions[0].used.items()
    stages = {name: stage for name, stage in used if name.split("/")[0] in seeds}
    return {
        "seeds": [each.seed for each in repetitions],
        "device": ", ".join(sorted({each.versions.get("device", "?") for each in stages.values()})),
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
