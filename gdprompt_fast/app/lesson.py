"""What is learnt and what is answered: the records that go from the model to the page."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..meta.inner import InnerUpdate

MOST_CHARACTERS = 200_000  # of what is tokenised at all
HIGHEST_RATE = 1e6
LEAST = 1e-45  # a probability below is counted as this


@dataclass(frozen=True)
class Lesson:
    """What is learnt: passages, at a rate η."""

    passages: tuple[str, ...]
    inner_lr: float

    @staticmethod
    def of(text: str | None, inner_lr: Any) -> Lesson:
        """The passages of a text, which blank lines divide.

        Raises:
            UserError: if there is none, or the rate is no number from 0 to ``HIGHEST_RATE``.
        """
        text = checked("passages", text)
        passages = tuple(each.strip() for each in re.split(r"\n\s*\n", text) if each.strip())
        if not passages:
            raise UserError("passages: expected a text to learn, got none")
        is_number = isinstance(inner_lr, int | float) and not isinstance(inner_lr, bool)
        if not is_number or not 0 <= inner_lr <= HIGHEST_RATE:
            raise UserError(
                f"η: expected a number from 0 to {HIGHEST_RATE:,.0f}, got {str(inner_lr)[:40]}"
            )
        return Lesson(passages, float(inner_lr))


@dataclass(frozen=True)
class PassageToken:
    """A token of a passage and its probability, after those before it, at θ and at θ'."""

    text: str
    before: float
    after: float


@dataclass(frozen=True)
class LearntLesson:
    """θ' of a lesson.

    Attributes:
        passages: the tokens of every passage but the first, which nothing predicts.
        seconds: what the inner step took.
    """

    lesson: Lesson
    update: InnerUpdate
    passages: list[list[PassageToken]]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(len(passage) + 1 for passage in self.passages)

    def nll(self, when: str) -> float:
        """The mean NLL of the passages' tokens, "before" or "after" the inner step."""
        shares = [getattr(token, when) for passage in self.passages for token in passage]
        return sum(-math.log(max(share, LEAST)) for share in shares) / len(shares)


@dataclass(frozen=True)
class AnswerToken:
    """A token of an answer.

    Attributes:
        ends: it is the one that ends an answer.
        own: in the answer's own setting: its probability and the likeliest tokens there.
        before: its probability after the question alone at θ.
        after: the same at θ'.
    """

    text: str
    ends: bool
    own: float
    likeliest: tuple[tuple[str, float], ...]
    before: float
    after: float


@dataclass(frozen=True)
class Answer:
    """What the model says in one setting, a key of ``SETTINGS``; or why it says nothing."""

    setting: str
    text: str = ""
    tokens: tuple[AnswerToken, ...] = ()
    problem: str = ""

    @property
    def probability(self) -> float:
        """Of the whole answer, in its setting."""
        return math.prod(token.own for token in self.tokens)


def checked(name: str, text: str | None) -> str:
    """What was typed, "" for nothing.

    Raises:
        UserError: if it is too long to be tokenised, or has halves of characters.
    """
    text = text or ""
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"{name}: expected at most {MOST_CHARACTERS:,} characters, got {len(text):,}"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}: expected whole characters, got half of one") from None
    return text
