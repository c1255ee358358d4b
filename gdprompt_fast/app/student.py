"""A model that learns passages in an inner step and answers questions, for many users at once.

The model is shared and its users are served one at a time. What a user sees follows from what is
asked alone, a :class:`Lesson` and a question: nothing is kept for a user. A few of the last θ' are
kept, and the adapters last written.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data import TripleEncoder, pad
from ..data.chat import ChatEncoder
from ..errors import UserError
from ..evaluation import SETTINGS, decode
from ..loading import positions
from ..meta.inner import InnerUpdate, inner_step
from ..models.inner_params import InnerParams
from ..teacher import greedy_answers
from .lesson import Answer, AnswerToken, LearntLesson, Lesson, PassageToken, checked
from .probabilities import Place, probabilities, shown

KEPT_LESSONS = 4  # θ' of so many of the longest lessons are kept, of short ones more
KEPT_ADAPTERS = 8

Report = Callable[[str], None]  # is told what is done next


@dataclass(frozen=True)
class Options:
    """How the model learns and answers.

    Attributes:
        inner_steps, inner_params: as in :func:`gdprompt_fast.inner_step`.
        answer_tokens: of the longest answer.
        max_context_tokens: of all passages of a lesson together.
        chat_template: whether questions are a user's turns in a chat.
    """

    inner_steps: int = 1
    inner_params: InnerParams = "full"
    answer_tokens: int = 32
    max_context_tokens: int = 512
    chat_template: bool = False


@dataclass
class Student:
    """The model with what it learnt last; every method may be called by several threads.

    Args:
        folder: to write adapters to; the caller removes it.

    Raises:
        UserError: if the tokenizer does not go with the options.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    options: Options
    folder: Path
    _encode: TripleEncoder = field(init=False)
    _lock: threading.RLock = field(init=False, default_factory=threading.RLock)
    _learnt: OrderedDict[Lesson, LearntLesson] = field(init=False, default_factory=OrderedDict)
    _written: OrderedDict[Lesson, Path] = field(init=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._encode = (ChatEncoder if self.options.chat_template else TripleEncoder)(
            self.tokenizer
        )

    def learn(self, lesson: Lesson, report: Report = lambda what: None) -> LearntLesson:
        """Takes the inner step, or finds it among the last ones taken.

        Raises:
            UserError: naming what of the lesson cannot be learnt, and why.
            FloatingPointError: if the inner loss is not finite.
        """
        rows = self._context_rows(lesson)
        with self._lock:
            if lesson in self._learnt:
                self._learnt.move_to_end(lesson)
                return self._learnt[lesson]
            report(f"inner step on {sum(map(len, rows))} tokens")
            start = time.perf_counter()
            update = self._inner_step(lesson, rows)
            seconds = time.perf_counter() - start
            report("what it changed")
            heads, tails = [row[:1] for row in rows], [row[1:] for row in rows]
            before = probabilities(self.model, heads, tails)
            with self._at(update, len(rows)):
                after = probabilities(self.model, heads, tails)
            passages = [self._passage(*of_row) for of_row in zip(tails, before, after, strict=True)]
            learnt = LearntLesson(lesson, update, passages, seconds)
            if not math.isfinite(learnt.nll("after")):
                raise FloatingPointError(
                    f"η: expected a rate at which θ' gives probabilities, got {lesson.inner_lr:g}"
                )
            self._keep(learnt)
            return learnt

    def check_question(self, lesson: Lesson, question: str | None) -> None:
        """That a question can be asked about a lesson.

        Raises:
            UserError: naming what of either cannot be used, and why.
        """
        self._context_rows(lesson)
        self._starts(lesson, question)

    def answer(
        self,
        lesson: Lesson,
        question: str | None,
        setting: str,
        report: Report = lambda what: None,
    ) -> Answer:
        """The greedy answer in one setting, and what the model holds of its tokens in all.

        Raises:
            UserError: naming what of the lesson or the question cannot be used, and why.
            FloatingPointError: if the inner loss is not finite.
        """
        query, prompt = self._starts(lesson, question)
        room = positions(self.model) - self.options.answer_tokens
        if setting == "prompt" and len(prompt) > room:
            return Answer(
                setting,
                problem=f"passages and question have {len(prompt):,} tokens, the model has room "
                f"for {room:,} before an answer",
            )
        with self._lock:
            learnt = self.learn(lesson, report)
            report(f"answering: {SETTINGS[setting]}")
            start = prompt if setting == "prompt" else query
            with self._at(learnt.update, 1) if setting == "fine_tuning" else nullcontext():
                (ids,) = greedy_answers(
                    self.model, [start], self._encode.end, self.options.answer_tokens
                )
            (before,) = probabilities(self.model, [query], [ids])
            with self._at(learnt.update, 1):
                (after,) = probabilities(self.model, [query], [ids])
            own = {"no_context": before, "fine_tuning": after}.get(setting)
            if own is None:
                (own,) = probabilities(self.model, [start], [ids])
        tokens = tuple(map(self._answer_token, ids, own, before, after))
        return Answer(setting, decode(self.tokenizer, ids), tokens)

    def adapter(self, lesson: Lesson, report: Report = lambda what: None) -> Path:
        """A zip of θ' as a PEFT adapter; the last ``KEPT_ADAPTERS`` of them stay.

        Raises:
            UserError: naming what of the lesson cannot be learnt, or of θ' not be written.
            FloatingPointError: if the inner loss is not finite.
        """
        with self._lock:
            learnt = self.learn(lesson, report)
            if lesson in self._written:
                self._written.move_to_end(lesson)
                return self._written[lesson]
            report("writing the adapter")
            place = self.folder / f"adapter-{time.time_ns()}"
            try:
                learnt.update.save_pretrained(place / "adapter", texts=lesson.passages)
                archive = shutil.make_archive(str(place / "adapter"), "zip", place / "adapter")
            except BaseException:
                shutil.rmtree(place, ignore_errors=True)
                raise
            shutil.rmtree(place / "adapter")
            self._written[lesson] = Path(archive)
            if len(self._written) > KEPT_ADAPTERS:
                shutil.rmtree(self._written.popitem(last=False)[1].parent)
            return Path(archive)

    def unknown_words(self, texts: Iterable[str]) -> list[str]:
        """The words that the tokenizer has no token for, each once."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or not self.tokenizer.is_fast:
            return []
        found: dict[str, None] = {}
        for text in texts:
            row = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            for token, (start, end) in zip(row["input_ids"], row["offset_mapping"], strict=True):
                if token == unknown:
                    found[text[start:end]] = None
        return list(found)

    def _inner_step(self, lesson: Lesson, rows: list[list[int]]) -> InnerUpdate:
        device = next(self.model.parameters()).device
        ids, mask = (tensor.to(device) for tensor in pad(rows))
        return inner_step(
            self.model,
            ids,
            mask,
            torch.zeros(len(rows), dtype=torch.long, device=device),
            inner_lr=lesson.inner_lr,
            inner_steps=self.options.inner_steps,
            inner_params=self.options.inner_params,
        )

    def _at(self, update: InnerUpdate, rows: int) -> AbstractContextManager[None]:
        """Inside, the model runs ``rows`` rows at θ'."""
        device = next(self.model.parameters()).device
        return update.applied_to(self.model, torch.zeros(rows, dtype=torch.long, device=device))

    def _keep(self, learnt: LearntLesson) -> None:
        self._learnt[learnt.lesson] = learnt
        most = KEPT_LESSONS * self.options.max_context_tokens
        while sum(each.tokens for each in self._learnt.values()) > most:
            self._learnt.popitem(last=False)

    def _context_rows(self, lesson: Lesson) -> list[list[int]]:
        """The rows of the inner step."""
        rows = self._encode.rows(lesson.passages)
        longest, most = positions(self.model), self.options.max_context_tokens
        for passage, row in zip(lesson.passages, rows, strict=True):
            if not 2 <= len(row) <= longest:
                raise UserError(
                    f"passages: expected 2 to {longest:,} tokens in each, which the model has "
                    f"positions for, got {len(row):,} in {_short(passage)}"
                )
        if sum(map(len, rows)) > most:
            raise UserError(
                f"passages: expected at most {most:,} tokens in all, got {sum(map(len, rows)):,}"
            )
        return rows

    def _starts(self, lesson: Lesson, question: str | None) -> tuple[array[int], array[int]]:
        """What stands before an answer: the question alone, and after the passages."""
        question = checked("question", question).strip()
        if not question:
            raise UserError("question: expected one, got none")
        example = self._encode.asked("\n\n".join(lesson.passages), question)
        if example is None:
            raise UserError(
                "question: expected one that is the same tokens with the passages before it, got "
                f"{_short(question)}"
            )
        room = positions(self.model) - self.options.answer_tokens
        if not 1 <= len(example.query) <= room:
            raise UserError(
                f"question: expected 1 to {room:,} tokens, which leaves room for an answer, got "
                f"{len(example.query):,}"
            )
        return example.query, example.prompt

    def _passage(
        self, ids: list[int], before: list[Place], after: list[Place]
    ) -> list[PassageToken]:
        places = zip(ids, before, after, strict=True)
        return [
            PassageToken(shown(self.tokenizer, token), at_theta.probability, adapted.probability)
            for token, at_theta, adapted in places
        ]

    def _answer_token(self, token: int, own: Place, before: Place, after: Place) -> AnswerToken:
        return AnswerToken(
            shown(self.tokenizer, token),
            token == self._encode.end,
            own.probability,
            tuple((shown(self.tokenizer, each), share) for each, share in own.likeliest),
            before.probability,
            after.probability,
        )


def _short(text: str, most: int = 40) -> str:
    """The beginning of a text, quoted."""
    return repr(text if len(text) <= most else f"{text[:most]}…")
