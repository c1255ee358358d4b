"""The folder that ``gdprompt data`` writes: training and test triples, and what they are."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .checkpoint import check_replaceable, write_folder, write_json
from .data import SOURCES, TrainTest, write_triples
from .errors import UserError

TRAIN_FILE, TEST_FILE, ABOUT_FILE = "train.jsonl", "test.jsonl", "data.json"
FILES = {TRAIN_FILE, TEST_FILE, ABOUT_FILE}
SAMPLES = 3


def check_data_folder(folder: Path) -> None:
    """Makes sure that writing ``folder`` replaces nothing but data of an earlier call.

    Raises:
        ValueError: if it is a file or holds anything else.
    """
    check_replaceable(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: expected a folder, got the file {folder}")
    others = {path.name for path in folder.iterdir()} - FILES if folder.exists() else set()
    if others:
        raise UserError(
            f"output: expected a new folder or one with {', '.join(sorted(FILES))} only, got "
            f"{folder} with {sorted(others)[0]}"
        )


def write_data(data: TrainTest, folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Writes triples as JSONL and what they are as JSON: the folder whole, or not at all."""
    about = {
        "name": name,
        **settings,
        "sizes": {"train": len(data.train), "test": len(data.test)},
        "counts": data.counts,
        "paper": SOURCES[name].paper,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("gdprompt_fast", "datasets")},
        },
    }

    def write(temporary: Path) -> None:
        write_triples(data.train, temporary / TRAIN_FILE)
        write_triples(data.test, temporary / TEST_FILE)
        write_json(temporary / ABOUT_FILE, about)

    write_folder(folder, write)


def counts_table(data: TrainTest, paper: dict[str, int]) -> str:
    """How many records there are and were dropped, beside the paper's counts, as Markdown."""
    lines = ["| records | here | paper |", "|---|---|---|"]
    for what, count in data.counts.items():
        theirs = f"{paper[what]:,}" if what in paper else ""
        lines.append(f"| {what} | {count:,} | {theirs} |")
    return "\n".join(lines)


def samples(records: Iterable[dict[str, Any]]) -> str:
    """Records spelt out, a field a line."""
    return "\n\n".join(
        "\n".join(f"{field}: {value}" for field, value in record.items()) for record in records
    )
