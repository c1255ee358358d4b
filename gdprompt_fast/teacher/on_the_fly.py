"""The teacher asked anew in every step: for data whose cache would not fit on a disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from ..data import Example, batched, end_token
from ..distributed.alike import check_same_weights
from ..meta.gathered import opened
from ..meta.targets import TeacherTargets, head_of
from .targets import teach


class Teacher(Protocol):
    """What answers the examples of a training, kept or asked anew.

    Attributes:
        examples: what it answers, with the responses that they came with.
    """

    examples: list[Example]

    def batch(self, indices: Sequence[int]) -> tuple[list[Example], TeacherTargets]:
        """These examples with the teacher's answers as responses, and its predictions of them."""


class TeacherOnTheFly:
    """A :class:`Teacher` that keeps nothing but the frozen model, which stays in memory.

    Its answers are those of :class:`TeacherCache` up to the rounding that batches of other lengths
    have, and on a CPU the very same every time that the same examples are asked for together.

    Args:
        teacher: the frozen causal LM that reads context ⊕ query; none of its weights is trained.
            It may be sharded: then all processes ask as often.
        examples: what it answers.
        answer_tokens: the longest greedy answer, in tokens.
        batch_size: examples answered at once.

    Raises:
        UserError: if several processes have other teachers.
    """

    def __init__(
        self, teacher: nn.Module, examples: Sequence[Example], answer_tokens: int, batch_size: int
    ) -> None:
        check_same_weights("teacher", teacher)
        self.examples = list(examples)
        self._teacher, self._answer_tokens, self._batch_size = teacher, answer_tokens, batch_size
        self._end = end_token(examples)
        self._head = head_of(teacher)

    def batch(self, indices: Sequence[int]) -> tuple[list[Example], TeacherTargets]:
        """These examples with the teacher's answers as responses, and its predictions of them."""
        answered: list[Example] = []
        parts: list[TeacherTargets] = []
        batches = list(batched(indices, self._batch_size))
        idle = self._rounds(len(batches)) - len(batches)
        for some in batches:
            examples, targets = self._teach([self.examples[index] for index in some])
            answered += examples
            parts.append(targets)
        for _ in range(idle):
            self._teach(self.examples[:1])
        hidden = [part.hidden for part in parts if part.hidden is not None]
        none = self._head.new_empty(0, self._head.shape[1])
        states = torch.cat(hidden or [none])  # none of no examples
        return answered, TeacherTargets(hidden=states, head=self._head)

    def _teach(self, asked: Sequence[Example]) -> tuple[list[Example], TeacherTargets]:
        return teach(self._teacher, asked, self._end, self._answer_tokens)

    def _rounds(self, own: int) -> int:
        """How often the processes of a sharded teacher have to ask it, this one ``own`` times for
        what it needs.
        """
        with opened(self._teacher) as plain:
            return own if plain is None else int(plain.most(own))
