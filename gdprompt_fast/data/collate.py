"""From examples of different lengths to the right-padded tensors of a meta step."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..batch import MetaBatch
from .tokenise import Example


@dataclass(frozen=True)
class Rows:
    """Right-padded rows that end in a response.

    Attributes:
        ids: LongTensor [B, T].
        mask: BoolTensor [B, T], True on real tokens.
        response_mask: BoolTensor [B, T], True on response tokens.
    """

    ids: Tensor
    mask: Tensor
    response_mask: Tensor

    def to(self, device: torch.device) -> Rows:
        """The same rows on ``device``, moved as by :func:`moved`."""
        return Rows(*(moved(each, device) for each in (self.ids, self.mask, self.response_mask)))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; to a GPU through pinned memory, which waits for nothing."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, T] and their mask [B, T].

    The padding is token 0, whatever that is: no position with a loss ever sees it.
    """
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def response_rows(starts: Sequence[array[int]], responses: Sequence[array[int]]) -> Rows:
    """Rows of start ⊕ response."""
    ids, mask = pad([start + response for start, response in zip(starts, responses, strict=True)])
    begins = torch.tensor([len(start) for start in starts])
    return Rows(ids, mask, mask & (torch.arange(ids.shape[1]) >= begins[:, None]))


def query_rows(examples: Sequence[Example]) -> Rows:
    """Rows of query ⊕ response: what the student sees."""
    return response_rows([e.query for e in examples], [e.response for e in examples])


def prompt_rows(examples: Sequence[Example]) -> Rows:
    """Rows of context ⊕ query ⊕ response: what the teacher sees."""
    return response_rows([e.prompt for e in examples], [e.response for e in examples])


def context_loss_mask(examples: Sequence[Example], mask: Tensor) -> Tensor:
    """Which of the examples' context tokens count, [C, T]; of ``mask``, the real ones."""
    counting = mask.clone()
    for row, example in zip(counting, examples, strict=True):
        if example.context_loss is not None:
            row[: len(example.context_loss)] = torch.tensor(example.context_loss)
    return counting


def meta_batch(
    examples: Sequence[Example],
    context_of: Sequence[int] | None = None,
    contexts_per_group: int = 1,
) -> MetaBatch:
    """Contexts for the inner step, and a query row of every example for the outer loss.

    Args:
        examples: in the order of the query rows, and so of a teacher's targets.
        context_of: the context of every example, 0, 1, … in ascending order: neighbours with the
            same number must have the same context, which is there once. One each by default.
        contexts_per_group: how many consecutive contexts share one θ', which answers the queries
            of all of them.
    """
    context_of = range(len(examples)) if context_of is None else context_of
    contexts = dict(zip(context_of, examples, strict=True))
    context_ids, context_mask = pad([example.context for example in contexts.values()])
    rows = query_rows(examples)
    return MetaBatch(
        context_ids,
        context_mask,
        rows.ids,
        rows.mask,
        rows.response_mask,
        context_group=torch.arange(len(contexts)) // contexts_per_group,
        query_group=torch.tensor(context_of) // contexts_per_group,
        context_loss_mask=context_loss_mask(list(contexts.values()), context_mask),
    )


def with_responses(
    examples: Sequence[Example], responses: Sequence[Sequence[int]]
) -> list[Example]:
    """The same examples with other responses, such as the teacher's answers."""
    return [replace(e, response=array("i", r)) for e, r in zip(examples, responses, strict=True)]
