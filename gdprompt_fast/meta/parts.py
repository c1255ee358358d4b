"""A batch in parts of a few groups each, whose gradients add up to the whole batch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import MetaBatch
from .config import MetaStepConfig, Rate, map_rate
from .lm_batch import LMBatch
from .targets import TeacherTargets


class Numbers(NamedTuple):
    """The numbers of a step that may change from one to the next, on its device.

    Attributes:
        inner_lr: η, [] or [G], or for each layer by its name.
        lm_weight: λ, [].
        query_count, lm_count: the denominators of the mean over queries and of L_LM's mean over
            rows, [].
        group_count: that of the mean of the inner loss over groups, [].
    """

    inner_lr: Rate
    lm_weight: Tensor
    query_count: Tensor
    lm_count: Tensor
    group_count: Tensor


def numbers_of(
    config: MetaStepConfig,
    batch: MetaBatch,
    lm_batch: LMBatch | None,
    query_count: int | Tensor | None,
    lm_count: int | Tensor | None,
    dtype: torch.dtype,
) -> Numbers:
    """Those asked for, or the batch's own; a batch of nothing but padding has zero over one."""
    real, device = batch.layout.real, batch.context_ids.device

    def there(number: float | Tensor) -> Tensor:
        if isinstance(number, Tensor):
            return number.to(device, dtype, non_blocking=True)
        return torch.full((), number, dtype=dtype, device=device)

    rows = real.contexts if lm_batch is None else len(lm_batch)
    return Numbers(
        map_rate(config.inner_lr, there),
        there(config.lm_weight).detach(),
        there(max(1, real.queries) if query_count is None else query_count),
        there(max(1, rows) if lm_count is None else lm_count),
        there(max(1, real.groups)),
    )


class Part(NamedTuple):
    """Some groups of a batch, by their numbers, with the teacher's targets of their queries."""

    groups: list[int] | None  # None for all
    batch: MetaBatch
    teacher: TeacherTargets | None

    def rate(self, inner_lr: Rate) -> Rate:
        """η of these groups."""
        if self.groups is None:
            return inner_lr
        index = torch.tensor(self.groups, device=self.batch.context_ids.device)
        return map_rate(inner_lr, lambda rate: rate[index] if rate.dim() else rate)


def parts_of(
    batch: MetaBatch, teacher: TeacherTargets | None, micro_groups: int | None
) -> Iterator[Part]:
    """The groups of a batch, ``micro_groups`` at a time; all at once for None."""
    if micro_groups is None or micro_groups >= batch.groups:
        yield Part(None, batch, teacher)
        return
    for groups in _chunks(batch, micro_groups):
        part, tokens = batch.select(groups)
        yield Part(groups, part, None if teacher is None else teacher.select(tokens))


def _chunks(batch: MetaBatch, size: int) -> Iterator[list[int]]:
    """The groups, ``size`` at a time, in order; one without a query goes with one that has some."""
    asked = set(batch.host.query_group.tolist())
    answering = [group for group in range(batch.groups) if group in asked]
    silent = [group for group in range(batch.groups) if group not in asked]
    yield sorted(answering[:size] + silent)
    for start in range(size, len(answering), size):
        yield answering[start : start + size]


def lm_parts_of(lm_batch: LMBatch, groups: int, micro_groups: int | None) -> Iterator[LMBatch]:
    """The rows of an L_LM batch, in as many parts as the groups."""
    return lm_batch.chunks(1 if micro_groups is None else -(-groups // micro_groups))
