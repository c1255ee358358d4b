"""From examples with gold responses to what the KL objective needs: the teacher's own words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..data import Example, prompt_rows, with_responses
from ..meta.targets import TeacherTargets
from .answers import greedy_answers


def teach(
    teacher: nn.Module, examples: Sequence[Example], eos: int, max_tokens: int
) -> tuple[list[Example], TeacherTargets]:
    """The same examples with the teacher's greedy answers as responses, and its predictions of
    them.

    The gold responses are not used: the teacher reads context ⊕ query and answers as it does.
    """
    device: torch.device = next(teacher.parameters()).device
    answers = greedy_answers(teacher, [example.prompt for example in examples], eos, max_tokens)
    answered = with_responses(examples, answers)
    rows = prompt_rows(answered).to(device)
    return answered, TeacherTargets.from_model(teacher, rows.ids, rows.mask, rows.response_mask)
