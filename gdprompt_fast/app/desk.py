"""What the page does with what is typed and pressed, as HTML to show; bad input is a message."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..evaluation import SETTINGS
from .lesson import Answer, Lesson
from .markup import answer_card, learnt_notice, lesson_card, notice, problem
from .student import Report, Student

# What a request may fail with through no fault of the code.
FAILURES = (UserError, FloatingPointError, torch.OutOfMemoryError, OSError)

Shown = tuple[str, ...]  # HTML: the status, the lesson, and in ``ask`` a card for every setting


class Desk:
    """Takes requests of the page to the student; ``report`` is told what is done next."""

    def __init__(self, student: Student) -> None:
        self._student = student

    def learn(self, text: Any, inner_lr: Any, report: Report) -> Shown:
        """The status and the lesson."""
        try:
            return self._learnt(Lesson.of(text, inner_lr), report)
        except FAILURES as error:
            return problem(str(error)), ""

    def ask(self, text: Any, inner_lr: Any, question: Any, report: Report) -> Iterator[Shown]:
        """The status, the lesson and the cards, again after each answer.

        The student is free in between: whoever stops listening holds up nobody.
        """
        answers: dict[str, Answer] = {}
        status, lesson_html = notice("Learning …"), ""
        try:
            lesson = Lesson.of(text, inner_lr)
            self._student.check_question(lesson, question)
            status, lesson_html = self._learnt(lesson, report, question)
            for setting in SETTINGS:
                answers[setting] = self._student.answer(lesson, question, setting, report)
                yield status, lesson_html, *_cards(answers)
        except FAILURES as error:
            yield problem(str(error)), lesson_html, *_cards({})

    def again(self, text: Any, inner_lr: Any, question: Any, report: Report) -> Iterator[Shown]:
        """As :meth:`ask`, and without a question as :meth:`learn`: η has changed."""
        if isinstance(question, str) and question.strip():
            yield from self.ask(text, inner_lr, question, report)
        else:
            yield *self.learn(text, inner_lr, report), *_cards({})

    def adapter(self, text: Any, inner_lr: Any, report: Report) -> tuple[str, str, Path | None]:
        """The status, the lesson, and the zip of the adapter if there is one."""
        try:
            lesson = Lesson.of(text, inner_lr)
            path = self._student.adapter(lesson, report)
            status, html = self._learnt(lesson, report)
            size = f"{path.stat().st_size / 1e6:.1f} MB"
            return status + notice(f"The adapter is a zip of {size}."), html, path
        except FAILURES as error:
            return problem(str(error)), "", None

    def _learnt(self, lesson: Lesson, report: Report, question: str = "") -> tuple[str, str]:
        learnt = self._student.learn(lesson, report)
        unknown = self._student.unknown_words([*lesson.passages, question])
        return learnt_notice(learnt, unknown), lesson_card(learnt)


def cleared() -> Shown:
    """What stands there when nothing is learnt."""
    return notice("Nothing learnt yet."), "", *_cards({})


def _cards(answers: dict[str, Answer]) -> Shown:
    return tuple(answer_card(answers.get(setting), setting) for setting in SETTINGS)
