"""Triples of running text: a context, the one word after it as query, and how it goes on.

The rule, as in the example of the paper's §4.1: a text is divided at white space and cut at a
random place. The words before the cut are the context, the first word after it is the query, the
next ones are the response. One triple is made of a paragraph; a short paragraph is dropped.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ..artifacts.progress import progress_bar
from ..errors import UserError
from .corpus import Corpus, Record, load_hub
from .texts import UTF_8, read_text

TITLE = re.compile(r"= [^=].* =")  # " = = Section = = " has more of them
HEADING = re.compile(r"=.*=")
HUB = ("Salesforce/wikitext", "wikitext-103-raw-v1")
ROWS_AT_ONCE = 1000
BEGINNING = 80  # characters of a dropped paragraph that are kept to say which it was


@dataclass(frozen=True)
class Cut:
    """Where a text is cut, counted in words.

    Attributes:
        min_words: a text of fewer words is dropped.
        min_context_words: of the context.
        max_context_words: of the context.
        response_words: of every response.
    """

    min_words: int
    min_context_words: int
    max_context_words: int
    response_words: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_context_words <= self.max_context_words or self.response_words < 1:
            raise UserError(
                "cut: expected 1 <= min_context_words <= max_context_words and response_words >= "
                f"1, got {self}"
            )
        if self.min_words <= self.min_context_words + self.response_words:
            raise UserError(
                f"cut: expected min_words to have room for context, query and response, got {self}"
            )


# 160 words of WikiText's test split are at most 214 tokens of GPT-NeoX, within the 256 that
# `gdprompt train` keeps. From 128 words on, the split gives 763 triples, near to the paper's 758.
PARAGRAPHS = Cut(min_words=128, min_context_words=64, max_context_words=160, response_words=32)


def cut_text(text: str, cut: Cut, rng: random.Random) -> Record | None:
    """A triple of ``text``, cut at random; None if the text is too short."""
    words = text.split()
    if len(words) < cut.min_words:
        return None
    last = min(cut.max_context_words, len(words) - 1 - cut.response_words)
    at = rng.randint(cut.min_context_words, last)
    return {
        "context": " ".join(words[:at]),
        "query": words[at],
        "response": " ".join(words[at + 1 : at + 1 + cut.response_words]),
    }


def cut_articles(articles: Iterable[list[str]], cut: Cut, seed: int) -> Corpus:
    """A triple of every text that is long enough; the triples of an article are a group."""
    rng = random.Random(seed)
    groups: list[list[Record]] = []
    short: list[Record] = []
    for texts in articles:
        triples = [cut_text(text, cut, rng) for text in texts]
        group = [triple for triple in triples if triple is not None]
        pairs = zip(texts, triples, strict=True)
        short += [{"begins": text[:BEGINNING]} for text, triple in pairs if triple is None]
        if group:
            groups.append(group)
    return Corpus(groups, {f"fewer than {cut.min_words} words": short} if short else {})


def articles_of(lines: Iterable[str]) -> Iterator[list[str]]:
    """The paragraphs of each article of WikiText's layout, without headings.

    A paragraph is a line. A title is a line " = Title = " between two blank lines; without them
    such a line is a piece of a formula, and left out like a heading.
    """
    paragraphs: list[str] = []
    before = line = ""
    for after in chain(map(str.strip, lines), [""]):
        if not before and not after and TITLE.fullmatch(line):
            if paragraphs:
                yield paragraphs
            paragraphs = []
        elif line and not HEADING.fullmatch(line):
            paragraphs.append(line)
        before, line = line, after
    if paragraphs:
        yield paragraphs


def read_wikitext_file(path: Path, seed: int, encoding: str = UTF_8) -> Corpus:
    """Triples of a text file of WikiText's layout, cut as :data:`PARAGRAPHS` says.

    Raises:
        ValueError: if no paragraph is long enough.
    """
    lines = io.StringIO(read_text(path, encoding), newline=None)
    corpus = cut_articles(articles_of(lines), PARAGRAPHS, seed)
    if not corpus.groups:
        raise UserError(
            f"{path}: expected paragraphs of at least {PARAGRAPHS.min_words} words, a line each, "
            "got none"
        )
    return corpus


def read_wikitext_hub(split: str, seed: int) -> Corpus:
    """Triples of WikiText-103 (raw) from the hub, cut as :data:`PARAGRAPHS` says.

    Args:
        split: ``train`` or ``test``.
        seed: of the cuts.
    """
    rows = load_hub(*HUB, split)

    def lines() -> Iterator[str]:
        with progress_bar(len(rows), f"WikiText-103, {split}", "lines") as bar:
            for chunk in rows.iter(ROWS_AT_ONCE):
                yield from chunk["text"]
                bar.update(len(chunk["text"]))

    return cut_articles(articles_of(lines()), PARAGRAPHS, seed)
