"""The outer loss: KL to the teacher or NLL of the gold response at θ', and the language-modelling
term at θ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import MetaBatch
from ..ops.phase import Phase
from ..ops.vocabulary import KLTarget, NLLTarget, Target
from ..update.adapted_layer import StepState, Weights, always_there
from ..update.attach import AdaptedModel
from .lm_batch import LMBatch
from .targets import TeacherTargets


def query_loss(
    adapted: AdaptedModel,
    batch: MetaBatch,
    teacher: TeacherTargets | None,
    level: int,
    outer_reduction: str,
    query_count: Tensor,
) -> Tensor:
    """The share of the batch's queries in the mean of the outer loss at each group's θ'.

    Args:
        teacher: with a target for each slot of the batch's layout.
    """
    layout = batch.layout
    hidden_BTD = adapted.hidden_states(batch.query_ids, layout.queries, level)
    hidden_SD = hidden_BTD.flatten(0, 1).index_select(0, layout.position_S - 1)
    target = _target(batch, teacher, adapted.state)
    losses_S = adapted.vocabulary.response_loss(hidden_SD, target, layout.slots)
    weight_S = layout.weight_S if outer_reduction == "sum" else layout.mean_weight_S
    return (losses_S * (weight_S / query_count).to(losses_S.dtype)).sum()


def _target(batch: MetaBatch, teacher: TeacherTargets | None, state: StepState) -> Target:
    """What the prediction of each slot's token is compared with, [G, J, …]."""
    layout = batch.layout
    if teacher is None:
        ids_S = batch.query_ids.flatten().index_select(0, layout.position_S)
        return NLLTarget(layout.slots.to_groups(ids_S))
    logits, hidden = teacher.logits, teacher.hidden
    return KLTarget(
        None if logits is None else layout.slots.to_groups(logits),
        None if hidden is None else layout.slots.to_groups(state.cast(hidden)),
        teacher.head,
    )


def lm_backward(
    model: nn.Module,
    lm_batch: LMBatch,
    count: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype | None,
    recompute: str,
    weights: Weights = always_there,
) -> Tensor:
    """The share of some rows in the mean over ``count`` of each row's mean next-token NLL at θ;
    adds weight times its gradient to ``.grad``, if there is a weight.
    """
    state = StepState(1, 0.0, Phase(second_order=False), dtype, weights=weights)
    adapted = AdaptedModel(model, {}, state)
    with adapted.differentiable(recompute):
        hidden_BTD = adapted.hidden_states(lm_batch.ids, lm_batch.rows, level=0)
        hidden_PD = hidden_BTD.flatten(0, 1).index_select(0, lm_batch.position_P)
        next_ids_P = lm_batch.ids.flatten().index_select(0, lm_batch.position_P + 1)
        target = NLLTarget(lm_batch.predictions.to_groups(next_ids_P))
        losses_P = adapted.vocabulary.response_loss(hidden_PD, target, lm_batch.predictions)
        loss = (losses_P * (lm_batch.weight_P / count).to(losses_P.dtype)).sum()
        if weight is not None:
            (weight * loss).backward()
        adapted.release()
    return loss.detach()
