"""A batch in parts of a few groups each, whose gradients add up to the whole batch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import MetaBatch
from .config import LMBatch
from .targets import TeacherTargets


class Counts(NamedTuple):
    """The denominators of the losses: of the whole batch, of which a step may take a part."""

    queries: int
    lm_rows: int


def counts_of(
    batch: MetaBatch, lm_batch: LMBatch | None, query_count: int | None, lm_count: int | None
) -> Counts:
    """Those asked for, or the batch's own."""
    rows = batch.context_ids if lm_batch is None else lm_batch[0]
    return Counts(query_count or len(batch.query_ids), lm_count or len(rows))


class Part(NamedTuple):
    """Some groups of a batch, with the teacher's targets of their queries."""

    batch: MetaBatch
    teacher: TeacherTargets | None


def parts_of(
    batch: MetaBatch, teacher: TeacherTargets | None, micro_groups: int | None
) -> Iterator[Part]:
    """The groups of a batch, ``micro_groups`` at a time; all at once for None."""
    if micro_groups is None or micro_groups >= batch.groups:
        yield Part(batch, teacher)
        return
    token_query = torch.arange(len(batch.query_ids), device=batch.query_ids.device)
    token_query = token_query.repeat_interleave(batch.response_mask.sum(1))
    for groups in _chunks(batch, micro_groups):
        context, query = (
            torch.isin(batch.context_group, groups),
            torch.isin(batch.query_group, groups),
        )
        context_ids, context_mask, loss_mask = _trimmed(
            batch.context_ids[context],
            batch.context_mask[context],
            batch.context_loss_mask[context],
        )
        query_ids, query_mask, response_mask = _trimmed(
            batch.query_ids[query], batch.query_mask[query], batch.response_mask[query]
        )
        part = MetaBatch(
            context_ids,
            context_mask,
            query_ids,
            query_mask,
            response_mask,
            torch.searchsorted(groups, batch.context_group[context]),
            torch.searchsorted(groups, batch.query_group[query]),
            loss_mask,
        )
        yield Part(part, None if teacher is None else teacher.select(query[token_query]))


def _chunks(batch: MetaBatch, size: int) -> Iterator[Tensor]:
    """The groups, ``size`` at a time, in order; one without a query goes with one that has some."""
    asked = torch.bincount(batch.query_group, minlength=batch.groups) > 0
    silent = (~asked).nonzero().flatten()
    first, *rest = asked.nonzero().flatten().split(size)
    yield torch.cat([first, silent]).sort().values
    yield from rest


def _trimmed(ids: Tensor, mask: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Rows without the padding that all of them have."""
    width = int(mask.sum(1).max())
    return tuple(each[:, :width] for each in (ids, mask, *others))


def lm_parts_of(lm_batch: LMBatch, groups: int, micro_groups: int | None) -> Iterator[LMBatch]:
    """The rows of an L_LM batch, in as many parts as the groups."""
    ids, mask = lm_batch
    parts = 1 if micro_groups is None else -(-groups // micro_groups)
    yield from zip(ids.chunk(parts), mask.chunk(parts), strict=True)
