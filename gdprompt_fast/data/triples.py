"""Records of {"context", "query", "response"} and, optionally, "answers": read from JSONL with
errors that name the line.

"response" is what a model is trained on, "answers" are all texts that count as right, the response
among them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..errors import UserError

FIELDS = ("context", "query", "response")
ANSWERS = "answers"


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

    If any record has "answers", a record without them gets its response as its one answer.

    Raises:
        ValueError: naming the file, the line and the field, if a line is not JSON or a field is
            missing, of another type or empty; or if the file is absent or holds no record.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: expected a JSONL file of triples, got no such file")
    records = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                records.append(_parse(line, f"{path}, line {number}"))
    if not records:
        raise UserError(f"{path}: expected at least one record, got none")
    if any(ANSWERS in record for record in records):
        for record in records:
            record.setdefault(ANSWERS, [record["response"]])
    return Dataset.from_list(records)


def write_triples(records: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Writes triples as the JSONL that :func:`read_triples` reads."""
    with Path(path).open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(_known_fields(record), ensure_ascii=False) + "\n")


def _known_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    answers = {} if record.get(ANSWERS) is None else {ANSWERS: list(record[ANSWERS])}
    return {field: record[field] for field in FIELDS} | answers


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: expected a JSON object, got invalid JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for field in FIELDS:
        if field not in record:
            raise UserError(f'{where}: expected the field "{field}", got only {sorted(record)}')
        value = record[field]
        if not isinstance(value, str) or not value.strip():
            raise UserError(f'{where}: expected "{field}" to be a non-empty string, got {value!r}')
    if ANSWERS in record and not _are_texts(record[ANSWERS]):
        raise UserError(
            f'{where}: expected "{ANSWERS}" to be a list of non-empty strings, '
            f"got {record[ANSWERS]!r}"
        )
    return _known_fields(record)


def _are_texts(answers: Any) -> bool:
    return (
        isinstance(answers, list)
        and bool(answers)
        and all(isinstance(answer, str) and answer.strip() for answer in answers)
    )
