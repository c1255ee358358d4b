"""The folder that ``gdprompt data`` writes: training and test triples, and what they are."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..artifacts.files import hash_of_file, read_json, write_folder, write_json
from ..artifacts.outputs import is_marked, written_by
from . import SOURCES, TrainTest, write_triples

DATA = "data"
TRAIN_FILE, TEST_FILE, ABOUT_FILE = "train.jsonl", "test.jsonl", "data.json"
FILES = {TRAIN_FILE, TEST_FILE, ABOUT_FILE}
SAMPLES = 3


def is_data_folder(folder: Path) -> bool:
    """Whether a folder holds what :func:`write_data` wrote, unchanged, and nothing else."""
    if {path.name for path in folder.iterdir()} != FILES or not is_marked(
        folder / ABOUT_FILE, DATA
    ):
        return False
    return read_json(folder / ABOUT_FILE).get("sha256") == _hashes(folder)


def _hashes(folder: Path) -> dict[str, str]:
    return {name: hash_of_file(folder / name) for name in (TRAIN_FILE, TEST_FILE)}


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
        hashes = {"sha256": _hashes(temporary)}
        write_json(temporary / ABOUT_FILE, {**written_by(DATA), **about, **hashes})

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
