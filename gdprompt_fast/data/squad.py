"""Triples of SQuAD: a passage, a question about it, and its answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .corpus import Corpus, Record, load_hub
from .texts import UTF_8, read_text

HUB = "rajpurkar/squad"
HUB_SPLITS = {"train": "train", "test": "validation"}  # SQuAD's own test set is not public
SENTENCE_END = re.compile(r"""[.!?]["'”)\]]*(\s+)(?=["“(\[]?[A-Z0-9])""")


class Row(NamedTuple):
    """A question as SQuAD has it; ``begin`` is where its first answer begins in the context."""

    article: str
    context: str
    question: str
    answers: list[str]
    id: str | None = None
    begin: int = 0


def squad_corpus(rows: Iterable[Row], sentences: bool = False) -> Corpus:
    """Triples of questions, an article's in a group; empty and repeated questions are dropped.

    A triple keeps all answers that differ, in the order of the annotators, and has the first of
    them as its response. Empty is a record that lacks a context, a question or an answer; repeated
    is a question asked about the same context before.

    Args:
        sentences: the context is not the passage but only the sentence with the first answer.
    """
    groups: dict[str, list[Record]] = {}
    dropped: dict[str, list[Record]] = {}
    seen: set[tuple[str, str]] = set()
    for row in rows:
        passage = sentence_with_answer(row) if sentences else row.context
        context, question = passage.strip(), row.question.strip()
        answers = list(dict.fromkeys(text.strip() for text in row.answers if text.strip()))
        name = {} if row.id is None else {"id": row.id}
        asked = {**name, "context": context, "query": question}
        if not (context and question and answers):
            dropped.setdefault("empty context, question or answer", []).append(asked)
        elif (context, question) in seen:
            dropped.setdefault("question repeated", []).append(asked)
        else:
            seen.add((context, question))
            triple = {**asked, "response": answers[0], "answers": answers}
            groups.setdefault(row.article, []).append(triple)
    return Corpus(list(groups.values()), dropped)


def sentence_with_answer(row: Row) -> str:
    """The sentence of the passage that the first answer stands in; several if it is in several."""
    if not row.answers:
        return ""
    end = row.begin + len(row.answers[0])
    breaks = [match.span(1) for match in SENTENCE_END.finditer(row.context)]
    first = max((after for before, after in breaks if after <= row.begin), default=0)
    last = min((before for before, _ in breaks if before >= end), default=len(row.context))
    return row.context[first:last]


def read_squad_file(path: Path, encoding: str = UTF_8, sentences: bool = False) -> Corpus:
    """Triples of a JSON file of SQuAD's official layout, as :func:`squad_corpus` makes them.

    Raises:
        ValueError: if the file has another layout or no usable question.
    """
    text = read_text(path, encoding)
    try:
        corpus = squad_corpus(_rows(json.loads(text)), sentences)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: expected SQuAD's official JSON layout (data, paragraphs, qas, answers), got "
            f"{type(error).__name__}: {error}"
        ) from None
    if not corpus.groups:
        raise UserError(f"{path}: expected at least one usable question, got {corpus.counts}")
    return corpus


def _rows(content: dict[str, list]) -> Iterator[Row]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [answer["text"] for answer in qa["answers"]]
                context, question, name = paragraph["context"], qa["question"], qa.get("id")
                "".join((context, question, *answers)).encode()  # no half of a character
                name = None if name is None else str(name)
                begin = int(qa["answers"][0].get("answer_start", 0)) if answers else 0
                yield Row(article["title"], context, question, answers, name, begin)


def read_squad_hub(split: str, sentences: bool = False) -> Corpus:
    """Triples of SQuAD from the hub, as :func:`squad_corpus` makes them.

    Args:
        split: ``train`` or ``test``, which is SQuAD's development set.
    """
    rows = load_hub(HUB, None, HUB_SPLITS[split])
    made = (
        Row(
            row["title"],
            row["context"],
            row["question"],
            row["answers"]["text"],
            row.get("id"),
            (row["answers"]["answer_start"] or [0])[0],
        )
        for row in rows
    )
    return squad_corpus(made, sentences)
