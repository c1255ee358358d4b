"""The options and results that every implementation of a meta step shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..batch import MetaBatch, check_tokens, describe
from ..errors import UserError
from ..models.architecture import (
    causal_lm,
    check_ids,
    check_model,
    check_row_lengths,
    compute_dtype,
)
from ..ops.backend import resolve_backend
from .targets import TeacherTargets, check_teacher

LMBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class MetaStepOutput:
    """Detached scalars of one meta step.

    Attributes:
        outer_loss: query_loss + λ · lm_loss, the loss whose gradient was added to ``.grad``.
        query_loss: the mean over queries of KL or NLL at θ', summed (or averaged) over response
            tokens.
        lm_loss: the mean over rows of each row's mean next-token NLL at θ, of the LM batch or the
            contexts.
        inner_loss: the mean over groups of the inner loss at θ, before the first inner step.
        backend: the implementation that ran.
    """

    outer_loss: Tensor
    query_loss: Tensor
    lm_loss: Tensor
    inner_loss: Tensor
    backend: str


def check_inner(inner_lr: Any, inner_steps: Any) -> None:
    if not isinstance(inner_lr, int | float) or not math.isfinite(inner_lr) or inner_lr < 0:
        raise UserError(f"inner_lr: expected a finite number >= 0, got {inner_lr!r}")
    if not isinstance(inner_steps, int) or isinstance(inner_steps, bool) or inner_steps < 1:
        raise UserError(f"inner_steps: expected an integer >= 1, got {inner_steps!r}")


def check_verify(verify: Any) -> None:
    if verify not in ("first", "never"):
        raise UserError(f'verify: expected "first" or "never", got {verify!r}')


def check_step(
    model: nn.Module,
    batch: MetaBatch,
    inner_lr: float,
    inner_steps: int,
    objective: str,
    teacher: TeacherTargets | None,
    outer_reduction: str,
    lm_weight: float,
    lm_batch: LMBatch | None,
    first_order: bool,
    backend: str,
    recompute: str,
    verify: str = "first",
    micro_groups: int | None = None,
    query_count: int | None = None,
    lm_count: int | None = None,
) -> str:
    """Checks the arguments of a meta step before anything is computed.

    Returns:
        The backend that is to run.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    check_model(model)
    if not isinstance(batch, MetaBatch):
        raise UserError(f"batch: expected a MetaBatch, got {describe(batch)}")
    embedding = causal_lm(model).get_input_embeddings().weight
    if batch.context_ids.device != embedding.device:
        raise UserError(
            f"batch: expected device {embedding.device} as the model, got "
            f"{batch.context_ids.device}"
        )
    check_ids("context_ids", batch.context_ids, model)
    check_ids("query_ids", batch.query_ids, model)
    check_row_lengths("context_mask", batch.context_mask, model)
    check_row_lengths("query_mask", batch.query_mask, model)
    check_inner(inner_lr, inner_steps)
    check_teacher(
        objective, teacher, int(batch.response_mask.sum()), len(embedding), embedding.device
    )
    if outer_reduction not in ("sum", "mean"):
        raise UserError(f'outer_reduction: expected "sum" or "mean", got {outer_reduction!r}')
    if not isinstance(lm_weight, int | float) or not math.isfinite(lm_weight) or lm_weight < 0:
        raise UserError(f"lm_weight: expected a finite number >= 0, got {lm_weight!r}")
    if not isinstance(first_order, bool):
        raise UserError(f"first_order: expected a bool, got {first_order!r}")
    if recompute not in ("none", "block"):
        raise UserError(f'recompute: expected "none" or "block", got {recompute!r}')
    check_verify(verify)
    for name, count in (
        ("micro_groups", micro_groups),
        ("query_count", query_count),
        ("lm_count", lm_count),
    ):
        if count is not None and (type(count) is not int or count < 1):
            raise UserError(f"{name}: expected an integer >= 1 or None, got {count!r}")
    if lm_batch is not None:
        check_lm_batch(lm_batch, model)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("model: expected at least one parameter with requires_grad, got none")
    return resolve_backend(backend, embedding.device, compute_dtype(model) or embedding.dtype)


def check_lm_batch(lm_batch: Any, model: nn.Module) -> None:
    if not isinstance(lm_batch, tuple) or len(lm_batch) != 2:
        raise UserError(f"lm_batch: expected a pair (ids, mask), got {describe(lm_batch)}")
    ids, mask = lm_batch
    check_tokens("lm_batch", ids, mask, "[N, T]")
    check_ids("lm_batch", ids, model)
    check_row_lengths("lm_batch", mask, model)
    if (mask.sum(1) < 2).any():
        raise UserError("lm_batch: expected at least 2 real tokens in every row")
