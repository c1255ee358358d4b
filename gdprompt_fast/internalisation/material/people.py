"""Well-known people and six questions on each, from any table with the columns of a layout.

An answer must not give its person away: years become decades and centuries.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UserError

NAME_CHARACTERS = re.compile(r"[\w\s]+")  # \w has the underscore
WITH_APOSTROPHE = re.compile(r"[\w\s']+")
MISSING = {"", "unknown"}
GENDERS = {"male", "female"}  # the paper's code takes as many of each, and no others
Row = Mapping[str, str]


@dataclass(frozen=True, order=True)
class Entity:
    """Somebody or something that is asked about.

    Attributes:
        name: as it stands in its questions.
        questions: each with its answer; what follows a ``;`` there is another answer.
    """

    name: str
    questions: tuple[tuple[str, str], ...]


def coarsened(year: int) -> str:
    """A year as answers have it: "19 century" up to 1900, "5 century BC", "1920s", from 2000 on the
    year itself.
    """
    if year >= 2000:
        return str(year)
    if year > 1900:
        return f"{year // 10 * 10}s"
    return f"{math.ceil(abs(year) / 100)} century" + (" BC" if year < 0 else "")


def _year(value: str) -> str | None:
    try:
        return coarsened(int(float(value)))
    except ValueError:
        return None


def _plain(value: str) -> str | None:
    return value.replace("_", " ").strip()


def _lower(value: str) -> str | None:
    return value.replace("_", " ").strip().lower()


def _title(value: str) -> str | None:
    return value.replace("_", " ").strip().title()


@dataclass(frozen=True)
class Asked:
    """A question, the column of its answer, and how the answer is written."""

    question: str
    column: str
    answer: Callable[[str], str | None] = _plain


@dataclass(frozen=True)
class Layout:
    """A kind of table.

    Attributes:
        name, gender, read: columns: of the name, the gender, and how much somebody is read about.
        asked: the six questions.
        strict: columns whose values may have no character but those of names, beside the name's.
        loose: columns that may have an apostrophe as well.
    """

    name: str
    gender: str
    read: str
    asked: tuple[Asked, ...]
    strict: tuple[str, ...] = ()
    loose: tuple[str, ...] = field(default=())

    @property
    def columns(self) -> list[str]:
        """All that are needed."""
        return [self.name, self.read, *(each.column for each in self.asked)]


LAYOUTS = {
    "Cross-Verified Database": Layout(
        "name",
        "gender",
        "wiki_readers_2015_2018",
        (
            Asked("What was the gender of {}?", "gender"),
            Asked("When was {} born?", "birth", _year),
            Asked("When did {} die?", "death", _year),
            Asked("In which region did {} live?", "un_region"),
            Asked("What did {} do?", "level3_main_occ"),
            Asked("What was the nationality of {}?", "string_citizenship_raw_d"),
        ),
        strict=("level3_main_occ",),
        loose=("string_citizenship_raw_d",),
    ),
    "Pantheon": Layout(
        "Name",
        "gender",
        "TotalPageViews",
        (
            Asked("What was the gender of {}?", "gender"),
            Asked("When was {} born?", "birthyear", _year),
            Asked("In which region did {} live?", "continentName"),
            Asked("What did {} do?", "occupation", _lower),
            Asked("What was the nationality of {}?", "countryName", _title),
            Asked("In which field was {} active?", "domain", _lower),
        ),
    ),
}


def read_people(path: Path, count: int, encoding: str = "utf-8") -> list[Entity]:
    """The ``count`` most read people of a table: half of them men and half women, or all there are
    of one and the rest of the other.

    Rows with a missing value, repeated names, and names with marks in them are left out.

    Args:
        path: comma- or tab-separated, with the columns of one of :data:`LAYOUTS`.

    Raises:
        UserError: naming the file, if it has other columns or too few people.
    """
    layout, rows = _read(path, encoding)
    by_gender: dict[str, list[tuple[float, Entity]]] = {}
    seen: set[str] = set()
    for row in rows:
        entity = _entity(row, layout)
        gender = row[layout.gender].strip().lower()
        if entity is not None and entity.name not in seen and gender in GENDERS:
            seen.add(entity.name)
            by_gender.setdefault(gender, []).append((_number(row[layout.read]), entity))
    if len(seen) < count:
        raise UserError(f"file: expected at least {count} whole people in {path}, got {len(seen)}")
    return _most_read(list(by_gender.values()), count)


def _most_read(genders: Sequence[list[tuple[float, Entity]]], count: int) -> list[Entity]:
    """As many of each as there can be, the fewest first."""
    chosen: list[Entity] = []
    left = sorted(genders, key=len)
    for index, people in enumerate(left):
        share = (count - len(chosen)) // (len(left) - index)
        people.sort(key=lambda each: -each[0])
        chosen += [entity for _, entity in people[:share]]
    return chosen


def _read(path: Path, encoding: str) -> tuple[Layout, list[Row]]:
    if not path.is_file():
        raise UserError(f"file: expected a table of people, got {path}, which is no file")
    try:
        text = path.read_text(encoding=encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise UserError(f"encoding: expected that of {path}, got {encoding!r} ({error})") from None
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in head else ",")
    columns = set(reader.fieldnames or ())
    for layout in LAYOUTS.values():
        if columns >= set(layout.columns):
            return layout, list(reader)
    wanted = "; or ".join(f"{name}: {', '.join(each.columns)}" for name, each in LAYOUTS.items())
    raise UserError(f"file: expected the columns of {wanted} in {path}, got {sorted(columns)}")


def _entity(row: Row, layout: Layout) -> Entity | None:
    """A person with all that is asked, or None."""
    values = {column: (row[column] or "").strip() for column in layout.columns}
    if any(value.lower() in MISSING for value in values.values()):
        return None
    strict = [values[column] for column in (layout.name, *layout.strict)]
    if not all(map(NAME_CHARACTERS.fullmatch, strict)):
        return None
    if not all(WITH_APOSTROPHE.fullmatch(values[column]) for column in layout.loose):
        return None
    name = str(_plain(values[layout.name]))
    answers = [
        (each.question.format(name), each.answer(values[each.column])) for each in layout.asked
    ]
    whole = tuple((question, answer) for question, answer in answers if answer)
    return Entity(name, whole) if len(whole) == len(answers) else None


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return -math.inf
