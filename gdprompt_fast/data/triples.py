"""Records of {"context", "query", "response"} and, optionally, "answers", "id" and "context_loss":
read from JSONL or a JSON array with errors that name the line.

"response" is what a model is trained on, "answers" are all texts that count as right, the response
among them. "context_loss" are the spans of the context, [[begin, end], …] in characters, whose
tokens count in the loss of the inner step; without it all do. Where a field is missing, the names
that other data sets have for it are looked for: those of ``datasets``' SQuAD and of the paper.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from datasets import Dataset

from ..errors import UserError
from .texts import UTF_8, read_text

FIELDS = ("context", "query", "response")
ANSWERS, ID, CONTEXT_LOSS = "answers", "id", "context_loss"
BYTE_ORDER_MARK = "\ufeff"  # also where a file begins that was put after another
OTHER_NAMES = {
    "context": ("privileged_context", "prompt"),
    "query": ("question", "prompt"),
    "response": (),
}
ARRAY, SPACE = re.compile(r"\s*\["), re.compile(r"\s*")


@dataclass(frozen=True)
class TrainTest:
    """Triples to train on and triples to test on.

    Attributes:
        train: rows of "context", "query", "response" and, of some sources, "answers" and "id".
        test: the same.
        counts: how many records were kept ("train", "test") and, by reason, dropped.
        dropped: those, each with its "reason".
    """

    train: Dataset
    test: Dataset
    counts: dict[str, int]
    dropped: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Records:
    """The triples of a file.

    Attributes:
        rows: all with the same fields.
        lines: where each begins in the file.
        read_as: the names that were taken for our own, in words; empty if none were.
    """

    rows: list[dict[str, Any]]
    lines: list[int]
    read_as: str


def read_triples(path: str | Path, encoding: str = UTF_8) -> Dataset:
    """The triples of texts of :func:`read_records`."""
    return Dataset.from_list(read_records(path, encoding).rows)


def read_records(path: str | Path, encoding: str = UTF_8) -> Records:
    """Triples of texts from a JSONL file, an object a line, or from a JSON array, gzipped or not;
    blank lines are ignored.

    If any record has "answers", a record without them gets its response as its one answer. An "id"
    is kept as text, if it is a text or an integer.

    Raises:
        ValueError: naming the file, the line and the field, if a line is not JSON or a field is
            missing, of another type or empty; or if the file is absent or holds no record.
    """
    path = Path(path)
    rows, lines, read_as = [], [], dict[str, None]()
    for line, content in read_objects(path, "triples", encoding):
        row, names = _triple(content, f"{path}, line {line}")
        rows.append(row)
        lines.append(line)
        read_as |= names
    if not rows:
        raise UserError(f"{path}: expected at least one record, got none")
    if any(ANSWERS in row for row in rows):
        for row in rows:
            row.setdefault(ANSWERS, [row["response"]])
    if any(ID in row for row in rows):
        for row in rows:
            row.setdefault(ID, None)
    if any(CONTEXT_LOSS in row for row in rows):
        for row in rows:
            row.setdefault(CONTEXT_LOSS, None)
    return Records(rows, lines, ", ".join(read_as))


def read_objects(path: Path, what: str, encoding: str = UTF_8) -> Iterator[tuple[int, Any]]:
    """What a JSONL file or a JSON array holds, each with the line where it begins.

    Args:
        what: the file is of, for errors.

    Raises:
        ValueError: naming the file, if it is absent, and the line, if that is not JSON.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no file" if path.exists() else "no such file"
        raise UserError(f"{path}: expected a JSONL file of {what}, got {got}")
    text = read_text(path, encoding)
    return _elements(text, path) if ARRAY.match(text) else _lines(text, path)


def write_triples(records: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Writes triples as the JSONL that :func:`read_triples` reads."""
    with Path(path).open("w", encoding=UTF_8) as out:
        for record in records:
            answers = {} if record.get(ANSWERS) is None else {ANSWERS: list(record[ANSWERS])}
            name = {} if record.get(ID) is None else {ID: record[ID]}
            spans = record.get(CONTEXT_LOSS)
            counts = {} if spans is None else {CONTEXT_LOSS: [list(span) for span in spans]}
            row = name | {field: record[field] for field in FIELDS} | answers | counts
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The number and the content of every line of JSONL."""
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            try:
                yield number, json.loads(line.removeprefix(BYTE_ORDER_MARK))
            except (ValueError, RecursionError) as error:
                raise _no_json(path, number, error) from None


def _elements(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The first line and the content of every element of a JSON array."""
    decoder = json.JSONDecoder()
    start, line = 0, 1
    at = _after_space(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        line += text.count("\n", start, at)
        start = at
        try:
            content, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _no_json(path, line, error) from None
        yield line, content
        at = _after_space(text, at)
        if text[at : at + 1] not in (",", "]"):
            raise _no_json(path, line, "no comma or end of the array after it")
        if text[at] == ",":
            at = _after_space(text, at + 1)
    if _after_space(text, at + 1) != len(text):
        raise _no_json(path, line, "more after the end of the array")


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    assert found is not None
    return found.end()


def _no_json(path: Path, line: int, error: Exception | str) -> UserError:
    return UserError(f"{path}, line {line}: expected a JSON object, got invalid JSON ({error})")


def _triple(content: Any, where: str) -> tuple[dict[str, Any], dict[str, None]]:
    """The known fields of a record, and the names that were taken for them, in words."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(content).__name__}")
    row, read_as = dict[str, Any](), dict[str, None]()
    if isinstance(content.get(ID), str | int) and not isinstance(content[ID], bool):
        row[ID] = check_text(str(content[ID]), ID, where)
    answers, names = _answers(content.get(ANSWERS), where), dict.fromkeys(content)
    for field in FIELDS:
        name = next((n for n in (field, *OTHER_NAMES[field]) if n in names), None)
        names.pop(name, None)  # a prompt is the context, or beside a context the query
        if name is not None:
            row[field] = check_text(content[name], name, where)
        elif field == "response" and answers:
            row[field], name = answers[0], f"the first of {ANSWERS}"
        else:
            raise UserError(
                f'{where}: expected the field "{field}", got only {short(sorted(content))}'
            )
        if name != field:
            read_as[f"{name} read as {field}"] = None
    if content.get(CONTEXT_LOSS) is not None:
        row[CONTEXT_LOSS] = check_spans(content[CONTEXT_LOSS], len(row["context"]), where)
    return row | ({ANSWERS: answers} if answers else {}), read_as


def _answers(value: Any, where: str) -> list[str]:
    """The gold answers: a list of texts, or as ``datasets`` has them; none if there is no value."""
    if value is None:
        return []
    texts = value.get("text") if isinstance(value, dict) else value
    if not isinstance(texts, list) or not texts:
        raise UserError(
            f'{where}: expected "{ANSWERS}" to be a list of non-empty strings, got {short(value)}'
        )
    read = [check_text(text, ANSWERS, where) for text in texts]
    return list(dict.fromkeys(read)) if isinstance(value, dict) else read


def check_spans(value: Any, length: int, where: str) -> list[list[int]]:
    """Parts of a text of ``length`` characters: at least one, none of them empty."""

    def is_span(span: Any) -> bool:
        numbers = isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
        return numbers and 0 <= span[0] < span[1] <= length

    if not isinstance(value, list) or not value or not all(map(is_span, value)):
        raise UserError(
            f'{where}: expected "{CONTEXT_LOSS}" to be a list of [begin, end] with '
            f"0 <= begin < end <= {length}, the context's characters, got {short(value)}"
        )
    return value


def check_text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        kind = "a list of non-empty strings" if field == ANSWERS else "a non-empty string"
        raise UserError(f'{where}: expected "{field}" to be {kind}, got {short(value)}')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise UserError(
            f'{where}: expected "{field}" to be text, got half a character, {half}, in it'
        ) from None
    return value
