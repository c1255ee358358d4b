"""Records of {"context", "query", "response"}: read from JSONL with errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

FIELDS = ("context", "query", "response")


@dataclass(frozen=True)
class TrainTest:
    """Triples to train on and triples to test on.

    Attributes:
        train: rows of "context", "query", "response" and, of some sources, "answers".
        test: the same.
        counts: how many records were kept ("train", "test") and, by reason, dropped.
    """

    train: Dataset
    test: Dataset
    counts: dict[str, int]


def read_triples(path: str | Path) -> Dataset:
    """Triples of texts from a JSONL file, an object a line; blank lines are ignored.

    Raises:
        ValueError: naming the file, the line and the field, if a line is not JSON or a field is
            missing, not a string or empty; or if the file is absent or holds no record.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSONL file of triples, got no such file")
    records = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                records.append(_parse(line, f"{path}, line {number}"))
    if not records:
        raise ValueError(f"{path}: expected at least one record, got none")
    return Dataset.from_list(records)


def write_triples(records: Iterable[dict[str, str]], path: str | Path) -> None:
    """Writes triples as the JSONL that :func:`read_triples` reads."""
    with Path(path).open("w", encoding="utf-8") as out:
        for record in records:
            out.write(
                json.dumps({field: record[field] for field in FIELDS}, ensure_ascii=False) + "\n"
            )


def _parse(line: str, where: str) -> dict[str, str]:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a JSON object, got invalid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for field in FIELDS:
        if field not in record:
            raise ValueError(f'{where}: expected the field "{field}", got only {sorted(record)}')
        value = record[field]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f'{where}: expected "{field}" to be a non-empty string, got {value!r}')
    return {field: record[field] for field in FIELDS}
