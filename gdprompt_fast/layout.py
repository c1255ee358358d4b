"""What of a batch depends on its values, worked out once on the host: a step reads nothing back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rows import GroupedRows


class BatchShape(NamedTuple):
    """The sizes of a batch: two batches of one shape take the same products.

    Attributes:
        groups: G.
        contexts, context_tokens: C and Tc.
        queries, query_tokens: Q and Tq.
        group_contexts, group_queries: the most contexts and queries of a group.
        group_responses: J, the most response tokens of a group.
    """

    groups: int
    contexts: int
    context_tokens: int
    queries: int
    query_tokens: int
    group_contexts: int
    group_queries: int
    group_responses: int

    def rung(self) -> BatchShape:
        """The sizes up to the next of a short ladder, so that few shapes stand for many batches.

        There are eight rungs between a power of two and the next: 6 % of padding on average.
        """
        sizes = dict(
            context_tokens=rung(self.context_tokens),
            query_tokens=rung(self.query_tokens),
            group_responses=rung(self.group_responses),
        )
        return self._replace(**sizes)

    def at_least(self, context_tokens: int, query_tokens: int, group_responses: int) -> BatchShape:
        """The shape with these sizes where it has smaller ones."""
        return self._replace(
            context_tokens=max(self.context_tokens, context_tokens),
            query_tokens=max(self.query_tokens, query_tokens),
            group_responses=max(self.group_responses, group_responses),
        )


def rung(size: int) -> int:
    """The next size of the ladder."""
    step = 1 << max(0, (size - 1).bit_length() - 4)
    return -(-size // step) * step


class Real(NamedTuple):
    """How many of the first groups, contexts and queries are no padding."""

    groups: int
    contexts: int
    queries: int


@dataclass(frozen=True)
class Layout:
    """Where the rows and response tokens of a batch stand, and how much each counts.

    A group g has J slots for response tokens, as many as the group with most of them needs: slot
    g·J + j is the j-th token of the group's queries, in the order of their rows. What fills up a
    group has weight zero, as padding rows and groups have.

    Attributes:
        shape: of the batch.
        real: what is no padding.
        contexts, queries: the groups of the C contexts and the Q queries.
        slots: the groups of the G·J slots, in order.
        token_S: the response token of each slot, in row-major order of the batch's response mask
            (the order of a teacher's targets), 0 for padding; None if the slots are in that order.
        tokens: the number of response tokens, R.
        position_S: where each slot's token stands in the flattened query ids [Q·Tq]; 1 for padding.
        weight_S, mean_weight_S: fp64, of each slot in the sum, and in the mean, over the tokens of
            its response.
        share_C: fp64, of each context in its group's mean.
        weight_CT: fp64, of position t in its context's mean over the tokens t + 1 that count.
    """

    shape: BatchShape
    real: Real
    contexts: GroupedRows
    queries: GroupedRows
    slots: GroupedRows
    token_S: Tensor | None
    tokens: int
    position_S: Tensor
    weight_S: Tensor
    mean_weight_S: Tensor
    share_C: Tensor
    weight_CT: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Layout:
        """The same with ``change`` applied to every tensor."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        changed: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif isinstance(value, GroupedRows):
                changed[name] = value.map(change)
        return replace(self, **changed)


def lay_out(
    context_group: Tensor,
    query_group: Tensor,
    loss_mask: Tensor,
    response_mask: Tensor,
    real: Real,
    least: BatchShape | None = None,
) -> Layout:
    """The layout of a batch with these tensors, on the host.

    Args:
        real: what is no padding.
        least: sizes of groups that are to be reached by padding; those of the batch by default.
    """
    groups = int(context_group.max()) + 1
    contexts = GroupedRows(context_group, groups, least.group_contexts if least else 0)
    queries = GroupedRows(query_group, groups, least.group_queries if least else 0)
    share_C, weight_CT = context_weights(context_group, groups, loss_mask, real.contexts)

    position_R = response_mask.flatten().nonzero().flatten()
    length_Q = response_mask.sum(1)
    group_R = query_group.repeat_interleave(length_Q)
    counts = torch.bincount(group_R, minlength=groups)
    slots = max(1, int(counts.max()), least.group_responses if least else 0)
    order = torch.argsort(group_R, stable=True)
    begins = torch.cumsum(counts, 0) - counts
    slot_R = group_R[order] * slots + torch.arange(len(order)) - begins[group_R[order]]

    def in_slots(of_tokens: Tensor, padding: int) -> Tensor:
        filled = torch.full((groups * slots,), padding, dtype=of_tokens.dtype)
        filled[slot_R] = of_tokens[order]
        return filled

    ones_R = torch.ones(len(order), dtype=torch.float64)
    ordered = slot_R.tolist() == order.tolist() == list(range(groups * slots))
    shape = BatchShape(
        groups,
        *(loss_mask.shape[0], loss_mask.shape[1]),
        *(response_mask.shape[0], response_mask.shape[1]),
        contexts.per_group,
        queries.per_group,
        slots,
    )
    return Layout(
        shape,
        real,
        contexts,
        queries,
        slots=GroupedRows(torch.arange(groups).repeat_interleave(slots), groups),
        token_S=None if ordered else in_slots(torch.arange(len(order)), 0),
        tokens=len(order),
        position_S=in_slots(position_R, 1),
        weight_S=in_slots(ones_R, 0),
        mean_weight_S=in_slots(ones_R / length_Q.repeat_interleave(length_Q), 0),
        share_C=share_C,
        weight_CT=weight_CT,
    )


def context_weights(
    group_C: Tensor, groups: int, loss_mask: Tensor, real: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weights of the inner loss, fp64: of each context in its group's mean [C], and of each
    position t in its context's mean over the tokens t + 1 that count [C, Tc] (the last position
    predicts none). Contexts from ``real`` on are padding.
    """
    is_real = torch.arange(len(group_C)) < (len(group_C) if real is None else real)
    per_group = torch.bincount(group_C[is_real], minlength=groups).clamp(min=1)
    predicts = torch.zeros(loss_mask.shape, dtype=torch.float64)
    predicts[:, :-1] = loss_mask[:, 1:].double()
    share_C = is_real.double() / per_group[group_C].double()
    return share_C, predicts / predicts.sum(1, keepdim=True).clamp(min=1)
