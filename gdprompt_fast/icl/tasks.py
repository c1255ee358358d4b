"""The six classification tasks: where their texts are, and what is asked about each.

Answers are the options after a space; labels are indices of options. From files the layouts are

    sst2, sst5, subj   lines "LABEL TEXT"; subj in latin-1, with 0 for subjective: the hub has 1
    mr                 the same in latin-1, 0 for negative, without a split
    agnews             csv with the header Class Index,Title,Description; classes from 1 on
    cb                 JSON lines of premise, hypothesis and label, a word

Of a single file the evaluation set is drawn first, as it always is, and demonstrations come from
the rest. The hub's rows have another order than files, so a seed draws other demonstrations there.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from ..data.corpus import load_hub
from ..data.texts import UTF_8, read_text
from ..errors import UserError

EVALUATION_SEED = 1
LATIN_1 = "latin-1"
CB_LABELS = ("entailment", "contradiction", "neutral")
NEWS = "Classify the news articles into the categories of World, Sports, Business, and Technology."
CB_QUESTION = "True, False, or Neither?"


class Item(NamedTuple):
    """A text as the model is asked about it, without its answer, and the index of the right one."""

    text: str
    label: int


Raw = Mapping[str, object]
Reader = Callable[[Path], Iterator[Item]]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        title: how tables name it.
        options: the answers, in the order of labels.
        hub: path and name of the data set on the hub.
        splits: there, for demonstrations and for evaluation.
        item: of a row of the hub's.
        read: the items of a file, in its order.
        evaluated: the size of the evaluation set.
    """

    title: str
    options: tuple[str, ...]
    hub: tuple[str, str | None]
    splits: tuple[str, str]
    item: Callable[[Raw], Item]
    read: Reader
    evaluated: int


def items_of(
    name: str, file: Path | None = None, test_file: Path | None = None
) -> tuple[list[Item], list[Item]]:
    """The items to draw demonstrations from, and the evaluation set in the order of its seed.

    Args:
        name: of ``TASKS``.
        file: to read the first from, and both if there is no ``test_file``; None: the hub's.

    Raises:
        UserError: naming the file and the line that is not of the task's layout; if the hub cannot
            be reached; if a single file has no rows beside the evaluation set.
    """
    task = TASKS[name]
    if file is None:
        if test_file is not None:
            raise UserError(f"test_file: expected none without a file, got {test_file}")
        to_draw, to_evaluate = (_from_hub(name, split) for split in task.splits)
        return to_draw, shuffled(to_evaluate, EVALUATION_SEED)[: task.evaluated]
    read = _read(task, file)
    if test_file is not None:
        return read, shuffled(_read(task, test_file), EVALUATION_SEED)[: task.evaluated]
    drawn = shuffled(read, EVALUATION_SEED)
    if len(drawn) <= task.evaluated:
        raise UserError(
            f"{file}: expected more than the {task.evaluated} rows that are evaluated, got "
            f"{len(drawn)}; a second file, for evaluation, is given after a comma"
        )
    return drawn[task.evaluated :], drawn[: task.evaluated]


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """In the order of ``datasets.Dataset.shuffle``."""
    order = Dataset.from_dict({"index": list(range(len(items)))}).shuffle(seed=seed)
    return [items[index] for index in order["index"]]


def _from_hub(name: str, split: str) -> list[Item]:
    task = TASKS[name]
    try:
        return [task.item(row) for row in load_hub(*task.hub, split)]
    except UserError as error:
        said = str(error).partition("; --source")[0]
        raise UserError(f"{said}; --files {name}=FILE reads one instead") from error


def _read(task: Task, file: Path) -> list[Item]:
    if not file.is_file():
        raise UserError(f"files: expected a file for {task.title}, got {file}")
    items = list(task.read(file))
    if not items:
        raise UserError(f"{file}: expected rows of {task.title}, got none")
    return items


def _filled(template: str) -> Callable[[str], str]:
    return lambda text: template.replace("{}", text.strip())


def _lines(ask: Callable[[str], str], labels: Sequence[int], encoding: str = UTF_8) -> Reader:
    """Of lines "LABEL TEXT".

    Args:
        labels: the index of the option for each of the file's labels, 0, 1, …
    """

    def read(path: Path) -> Iterator[Item]:
        for number, line in enumerate(read_text(path, encoding).split("\n"), 1):
            label, _, text = line.strip().partition(" ")
            if label.isdecimal() and int(label) < len(labels) and text.strip():
                yield Item(ask(text), labels[int(label)])
            elif line.strip():
                raise UserError(
                    f"{path}, line {number}: expected a label below {len(labels)} and a text, got "
                    f"{line[:60]!r}"
                )

    return read


def _news_csv(path: Path) -> Iterator[Item]:
    rows = csv.DictReader(read_text(path).splitlines())
    for number, row in enumerate(rows, 2):
        index, title, text = (row.get(key) for key in ("Class Index", "Title", "Description"))
        if index not in ("1", "2", "3", "4") or title is None or text is None:
            raise UserError(
                f"{path}, line {number}: expected Class Index (1 to 4), Title and Description, got "
                f"{row}"
            )
        yield Item(_ask_news(f"{title} {text}"), int(index) - 1)


def _cb_json(path: Path) -> Iterator[Item]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            row = json.loads(line)
            yield Item(_ask_cb(row["premise"], row["hypothesis"]), CB_LABELS.index(row["label"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}, line {number}: expected premise, hypothesis and a label of "
                f"{', '.join(CB_LABELS)}, got {line[:60]!r}"
            ) from None


def _ask_cb(premise: str, hypothesis: str) -> str:
    return f"{premise.strip()} Question: {hypothesis.strip()}. {CB_QUESTION} Answer:"


def _of_hub(ask: Callable[[str], str], field: str) -> Callable[[Raw], Item]:
    return lambda row: Item(ask(str(row[field])), int(str(row["label"])))


def _cb_of_hub(row: Raw) -> Item:
    return Item(_ask_cb(str(row["premise"]), str(row["hypothesis"])), int(str(row["label"])))


_ask_sentence = _filled("Sentence: {} Label:")
_ask_review = _filled("Review: {} Sentiment:")
_ask_input = _filled("Input: {} Type:")
_ask_news = _filled(f"{NEWS} Article: {{}} Answer:")
SENTIMENTS = ("Negative", "Positive")
DEGREES = ("terrible", "bad", "neutral", "good", "great")

TASKS = {
    "cb": Task(
        "CB",
        ("True", "False", "Neither"),
        ("aps/super_glue", "cb"),
        ("train", "validation"),
        _cb_of_hub,
        _cb_json,
        56,
    ),
    "sst2": Task(
        "SST-2",
        SENTIMENTS,
        ("nyu-mll/glue", "sst2"),
        ("train", "validation"),
        _of_hub(_ask_sentence, "sentence"),
        _lines(_ask_sentence, (0, 1)),
        872,
    ),
    "sst5": Task(
        "SST-5",
        DEGREES,
        ("SetFit/sst5", None),
        ("train", "validation"),
        _of_hub(_ask_sentence, "text"),
        _lines(_ask_sentence, (0, 1, 2, 3, 4)),
        1101,
    ),
    "mr": Task(
        "MR",
        SENTIMENTS,
        ("cornell-movie-review-data/rotten_tomatoes", None),
        ("train", "validation"),
        _of_hub(_ask_review, "text"),
        _lines(_ask_review, (0, 1), LATIN_1),
        1066,
    ),
    "subj": Task(
        "Subj",
        ("objective", "subjective"),
        ("SetFit/subj", None),
        ("train", "test"),
        _of_hub(_ask_input, "text"),
        _lines(_ask_input, (1, 0), LATIN_1),
        2000,
    ),
    "agnews": Task(
        "AGNews",
        ("World", "Sports", "Business", "Technology"),
        ("fancyzhx/ag_news", None),
        ("train", "test"),
        _of_hub(_ask_news, "text"),
        _news_csv,
        2000,
    ),
}
