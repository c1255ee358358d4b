"""The part of a batch that one of several processes takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch import MetaBatch
from .config import Rate, check_rates, map_rate
from .lm_batch import LMBatch
from .targets import TeacherTargets


def share_of(
    batch: MetaBatch,
    rank: int,
    world_size: int,
    *,
    teacher: TeacherTargets | None = None,
    lm_batch: LMBatch | tuple[Tensor, Tensor] | None = None,
    inner_lr: Rate = 1e-3,
) -> dict[str, Any]:
    """What process ``rank`` gives to :func:`gdprompt_fast.fast_meta_step` of a batch that all have.

    Losses and gradients of the processes add up to those of one that takes the whole batch:
    ``reduce_gradients`` (``distributed/reduce.py``) sums the latter. Every ``world_size``-th group
    that has a query is a process's, with its contexts and queries; where there are fewer groups
    than processes, some get nothing but padding.

    Returns:
        The arguments ``batch``, ``teacher``, ``lm_batch``, ``inner_lr``, ``query_count`` and
        ``lm_count``.

    Raises:
        ValueError: if a tensor of rates has another number than the batch has groups.
    """
    check_rates(inner_lr, batch.groups)
    rows = None if lm_batch is None else LMBatch.of(lm_batch)
    groups = _groups_of(batch, rank, world_size)
    device = batch.context_ids.device
    own, tokens = MetaBatch.padding().to(device), torch.zeros(0, dtype=torch.long, device=device)
    if groups:
        own, tokens = batch.select(groups)
    index = torch.tensor(groups or [0], device=device)
    count = batch.layout.real.contexts if rows is None else len(rows)
    return {
        "batch": own,
        "teacher": None if teacher is None else teacher.select(tokens),
        "lm_batch": None if rows is None else _rows_of(rows, rank, world_size),
        "inner_lr": map_rate(inner_lr, lambda rate: _rate_of(rate, index)),
        "query_count": max(1, batch.layout.real.queries),
        "lm_count": max(1, count),
    }


def _groups_of(batch: MetaBatch, rank: int, world_size: int) -> list[int]:
    """Groups without a query go to process 0, which has one with some."""
    asked = set(batch.host.query_group.tolist())
    answering = [group for group in range(batch.groups) if group in asked]
    silent = [group for group in range(batch.groups) if group not in asked]
    return sorted(answering[rank::world_size] + (silent if rank == 0 else []))


def _rate_of(rate: Any, index: Tensor) -> Any:
    return rate.index_select(0, index) if isinstance(rate, Tensor) and rate.dim() else rate


def _rows_of(rows: LMBatch, rank: int, world_size: int) -> LMBatch:
    own = slice(rank, None, world_size)
    if rank >= len(rows):
        return LMBatch.padding().to(rows.ids.device)
    return LMBatch(rows.ids[own], rows.mask[own])
