"""Creative works and questions on them, from triples of subject, predicate and object."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

from ...errors import UserError
from .people import Entity, coarsened

PRONOUNS = {"he", "she", "it", "they"}
IN_BRACKETS = re.compile(r"\s*\([^)]*\)")
FOUR_DIGITS = re.compile(r"\b(\d{4})\b")
FEWEST = 4  # questions of an entity
YEAR = "P577"
FIRST_NAME = "First name of the {} of {{}}?"
TEMPLATES = {
    "P123": "Who is the publisher of {}?",
    YEAR: "When was {} published or released?",
    "P136": "What is the genre of {}?",
    "P407": "In which language was {} published?",
    "P364": "In which language was {} published?",
    "P179": "Which series is {} part of?",
    "P50": FIRST_NAME.format("author"),
    "P57": FIRST_NAME.format("director"),
    "P58": FIRST_NAME.format("screenwriter"),
    "P344": FIRST_NAME.format("cinematographer"),
    "P98": FIRST_NAME.format("editor"),
    "P1040": FIRST_NAME.format("editor"),
    "P162": FIRST_NAME.format("producer"),
    "P86": FIRST_NAME.format("composer"),
    "P31": "What is the type of {}?",
    "P840": "Where is {} set?",
    "P915": "Where was {} filmed?",
    "P127": "Who owns {}?",
    "P178": "Who developed {}?",
    "P750": "What is the distributor of {}?",
    "P275": "What is the license of {}?",
    "P921": "What is the main subject of {}?",
    "P135": "Which movement is {} associated with?",
    "P180": "What does {} depict?",
    "P195": "Which collection is {} part of?",
}
PEOPLE = {name for name, question in TEMPLATES.items() if question.startswith("First name")}
# (subject, predicate, object), by the heads of the columns
COLUMNS = (("subject", "predicate", "object"), ("sub_label", "relation", "obj_label"))


def read_triples(path: Path, count: int | None, encoding: str = "utf-8") -> list[Entity]:
    """The ``count`` works with the most questions, at least four each; None: all there are.

    Subjects that occur once and pronouns are left out, and a second question with the same answer.

    Args:
        path: tab- or comma-separated, with one of :data:`COLUMNS`.

    Raises:
        UserError: naming the file, if it has other columns or too few works.
    """
    triples = [row for row in _rows(path, encoding) if _useful(row)]
    occurs = Counter(subject for subject, _, _ in triples)
    questions: dict[str, dict[str, str]] = {}
    for subject, predicate, value in triples:
        if occurs[subject] < 2 or predicate not in TEMPLATES:
            continue
        name = IN_BRACKETS.sub("", subject).strip()
        answer = _answer(predicate, IN_BRACKETS.sub("", value).strip())
        its = questions.setdefault(name, {})
        question = TEMPLATES[predicate].format(name)
        if name and answer and question not in its and answer not in its.values():
            its[question] = answer
    whole = [
        Entity(name, tuple(its.items())) for name, its in questions.items() if len(its) >= FEWEST
    ]
    wanted = len(whole) if count is None else count
    if not whole or len(whole) < wanted:
        raise UserError(
            f"file: expected at least {max(wanted, 1)} works with {FEWEST} questions in {path}, "
            f"got {len(whole)}"
        )
    return sorted(whole, key=lambda each: (-len(each.questions), each.name))[:wanted]


def _rows(path: Path, encoding: str) -> list[tuple[str, str, str]]:
    if not path.is_file():
        raise UserError(f"file: expected a table of triples, got {path}, which is no file")
    with path.open(encoding=encoding, newline="") as file:
        head = file.readline()
        file.seek(0)
        reader = csv.DictReader(file, delimiter="\t" if "\t" in head else ",")
        names = set(reader.fieldnames or ())
        for columns in COLUMNS:
            if names >= set(columns):
                return [tuple(row[column] or "" for column in columns) for row in reader]  # type: ignore[misc]
    wanted = " or ".join(", ".join(columns) for columns in COLUMNS)
    raise UserError(f"file: expected the columns {wanted} in {path}, got {sorted(names)}")


def _useful(row: tuple[str, str, str]) -> bool:
    subject, _, value = row
    return bool(subject and value) and not {subject.lower(), value.lower()} & PRONOUNS


def _answer(predicate: str, value: str) -> str | None:
    """A year coarsened, a person by the first name, anything else as it is."""
    if predicate == YEAR:
        year = FOUR_DIGITS.search(value)
        return coarsened(int(year[1])) if year else None
    if predicate in PEOPLE:
        first, *others = value.split() or [""]
        return first if others and len(first) > 1 else value
    return value
