"""A batch in parts of a few groups each, whose gradients add up to the whole batch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import MetaBatch
from ..layout import BatchShape
from ..models.walk import parameters_of
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

    def map(self, change: Callable[[Tensor], Tensor]) -> Numbers:
        return Numbers(map_rate(self.inner_lr, change), *map(change, self[1:]))

    @property
    def key(self) -> Any:
        """Equal where the same work is to be done."""
        rate = self.inner_lr
        if isinstance(rate, Mapping):
            return tuple((name, tuple(own.shape)) for name, own in rate.items())
        return tuple(rate.shape)  # type: ignore[union-attr]


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

    rows = real.contexts if lm_batch is None else lm_batch.real
    return Numbers(
        map_rate(config.inner_lr, there),
        there(config.lm_weight).detach(),
        there(max(1, real.queries) if query_count is None else query_count),
        there(max(1, rows) if lm_count is None else lm_count),
        there(max(1, real.groups)),
    )


def number_dtype(model: nn.Module) -> torch.dtype:
    """Of a step's numbers: fp64 for a model in fp64, else fp32."""
    weights = {parameter.dtype for _, parameter in parameters_of(model)}
    return torch.float64 if torch.float64 in weights else torch.float32


class Part(NamedTuple):
    """Some groups of a batch, by their numbers, with the teacher's targets of their queries, one
    for each slot of the batch's layout.
    """

    groups: list[int] | None  # None for all
    batch: MetaBatch
    teacher: TeacherTargets | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Part:
        teacher = None if self.teacher is None else self.teacher.map(change)
        return self._replace(batch=self.batch.map(change), teacher=teacher)

    @property
    def key(self) -> Any:
        """Equal where the same work is to be done."""
        layout = self.batch.layout
        grouped = (layout.contexts, layout.queries)
        teacher = None if self.teacher is None else self.teacher.key
        return layout.shape, tuple(rows.in_order for rows in grouped), teacher

    def rate(self, inner_lr: Rate) -> Rate:
        """η of these groups; zero for padding."""

        def own(rate: Tensor) -> Tensor:
            if not rate.dim():
                return rate
            if self.groups is not None:
                rate = rate.index_select(0, torch.tensor(self.groups, device=rate.device))
            return F.pad(rate, (0, self.batch.groups - len(rate)))

        return map_rate(inner_lr, own)


def parts_of(
    batch: MetaBatch, teacher: TeacherTargets | None, micro_groups: int | None, ladder: bool = False
) -> list[Part]:
    """The groups of a batch, ``micro_groups`` at a time; all at once for None.

    Args:
        ladder: all parts are padded to one shape, of sizes of a short ladder.
    """
    if micro_groups is None or micro_groups >= batch.groups:
        parts = [Part(None, batch, teacher)]
    else:
        parts = []
        for groups in _chunks(batch, micro_groups):
            some, tokens = batch.select(groups)
            parts.append(Part(groups, some, None if teacher is None else teacher.select(tokens)))
    if ladder:
        shapes = zip(*(part.batch.layout.shape for part in parts), strict=True)
        shape = BatchShape(*map(max, shapes)).rung()
        parts = [part._replace(batch=part.batch.padded(shape)) for part in parts]
    return [_in_slots(part) for part in parts]


def padding_part(like: Part) -> Part:
    """Nothing but padding, as a part of the same step."""
    batch, teacher = MetaBatch.padding().to(like.batch.context_ids.device), like.teacher
    none = None if teacher is None else teacher.map(lambda of_token: of_token[:0])
    groups = None if like.groups is None else like.groups[:1]
    return _in_slots(Part(groups, batch, none))


def _in_slots(part: Part) -> Part:
    """The part with the teacher's targets in the order of the slots."""
    layout = part.batch.layout
    if part.teacher is None or layout.token_S is None:
        return part
    if layout.tokens == 0:
        slots = len(layout.position_S)
        return part._replace(
            teacher=part.teacher.map(lambda targets: targets.new_zeros(slots, targets.shape[1]))
        )
    return part._replace(teacher=part.teacher.select(layout.token_S))


def _chunks(batch: MetaBatch, size: int) -> Iterator[list[int]]:
    """The groups, ``size`` at a time, in order; one without a query goes with one that has some."""
    asked = set(batch.host.query_group.tolist())
    answering = [group for group in range(batch.groups) if group in asked]
    silent = [group for group in range(batch.groups) if group not in asked]
    yield sorted(answering[:size] + silent)
    for start in range(size, len(answering), size):
        yield answering[start : start + size]


def lm_parts_of(
    lm_batch: LMBatch | None, groups: int, micro_groups: int | None, ladder: bool
) -> list[LMBatch]:
    """The rows of an L_LM batch, if there is one, in as many parts as the groups."""
    if lm_batch is None:
        return []
    parts = lm_batch.chunks(1 if micro_groups is None else -(-groups // micro_groups))
    return [part.on_ladder() if ladder else part for part in parts]
