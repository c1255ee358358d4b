"""The teacher asked anew in every step: for data whose cache would not fit on a disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from ..data import Example, batched, end_token
from ..meta.targets import TeacherTargets
from ..models.architecture import backbone_and_head
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
        examples: what it answers.
        answer_tokens: the longest greedy answer, in tokens.
        batch_size: examples answered at once.
    """

    def __init__(
        self, teacher: nn.Module, examples: Sequence[Example], answer_tokens: int, batch_size: int
    ) -> None:
        self.examples = list(examples)
        self._teacher, self._answer_tokens, self._batch_size = teacher, answer_tokens, batch_size
        self._end = end_token(examples)

    def batch(self, indices: Sequence[int]) -> tuple[list[Example], TeacherTargets]:
        """These examples with the teacher's answers as responses, and its predictions of them."""
        answered: list[Example] = []
        parts: list[TeacherTargets] = []
        for some in batched(indices, self._batch_size):
            asked = [self.examples[index] for index in some]
            examples, targets = teach(self._teacher, asked, self._end, self._answer_tokens)
            answered += examples
            parts.append(targets)
        head = backbone_and_head(self._teacher)[1].weight.detach()
        hidden = [part.hidden for part in parts if part.hidden is not None]
        states = torch.cat(hidden or [head.new_empty(0, head.shape[1])])  # none of no examples
        return answered, TeacherTargets(hidden=states, head=head)
