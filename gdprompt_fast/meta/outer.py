"""The outer loss: KL to the teacher or NLL of the gold response at θ', and the language-modelling
term at θ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import MetaBatch
from ..ops.phase import Phase
from ..ops.rows import GroupedRows
from ..ops.vocabulary import GoldTarget, Target, TeacherTarget
from ..update.attach import AdaptedModel
from ..update.site import StepState
from .config import LMBatch
from .loss_weights import context_weights
from .targets import TeacherTargets


def outer_target(
    batch: MetaBatch, teacher: TeacherTargets | None, token_rows: GroupedRows, state: StepState
) -> Target:
    """What each response token's prediction is compared with, in group-major order."""
    if teacher is None:
        return GoldTarget(token_rows.to_groups(batch.query_ids[batch.response_mask]))
    logits, hidden = teacher.logits, teacher.hidden
    return TeacherTarget(
        None if logits is None else token_rows.to_groups(logits),
        None if hidden is None else token_rows.to_groups(state.cast(hidden)),
        teacher.head,
    )


def response_weights(
    batch: MetaBatch, query_count: int, outer_reduction: str, dtype: torch.dtype
) -> Tensor:
    """The weight of every response token in the mean over ``query_count`` queries, [R]."""
    lengths_Q = batch.response_mask.sum(1)
    per_query = torch.full_like(lengths_Q, 1, dtype=dtype) / query_count
    if outer_reduction == "mean":
        per_query = per_query / lengths_Q
    return per_query.repeat_interleave(lengths_Q)


def lm_backward(
    model: nn.Module,
    lm_batch: LMBatch,
    count: int,
    weight: float,
    dtype: torch.dtype | None,
    recompute: str,
) -> Tensor:
    """The share of some rows in the mean over ``count`` of each row's mean next-token NLL at θ;
    adds weight times its gradient to ``.grad``.
    """
    ids, mask = lm_batch
    one_group = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    adapted = AdaptedModel(model, {}, StepState(1, 0.0, Phase(second_order=False), dtype))
    with adapted.differentiable(recompute):
        hidden_BTD = adapted.hidden_states(ids, GroupedRows(one_group, 1), level=0)
        _, weight_BT = context_weights(one_group, 1, mask)
        predicts = weight_BT > 0
        hidden_ND = hidden_BTD[predicts]
        rows = GroupedRows(one_group.repeat_interleave(predicts.sum(1)), 1)
        target = GoldTarget(rows.to_groups(ids.roll(-1, 1)[predicts]))
        losses_N = adapted.vocabulary.response_loss(hidden_ND, target, rows)
        loss = (losses_N * weight_BT[predicts].to(losses_N.dtype)).sum() / count
        if weight > 0:
            (weight * loss).backward()
        adapted.release()
    return loss.detach()
