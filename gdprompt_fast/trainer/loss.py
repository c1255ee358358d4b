"""The outer loss without its gradient, for evaluation: by the model's own forward at θ'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import MetaBatch
from ..meta.config import MetaStepConfig, check_step
from ..meta.inner import inner_step
from ..meta.targets import TeacherTargets


@torch.no_grad()
def outer_loss(
    model: nn.Module, batch: MetaBatch, teacher: TeacherTargets | None, config: MetaStepConfig
) -> tuple[Tensor, Tensor]:
    """The ``outer_loss`` of :func:`gdprompt_fast.fast_meta_step`, and the logits it follows from.

    Returns:
        The loss [], and the logits [Q, Tq, V] of the query rows, each at the θ' of its group; both
        in fp32 or better.

    Raises:
        UserError: for arguments that the step would not take.
        FloatingPointError: if an inner loss is not finite.
    """
    check_step(model, batch, config, teacher, None)
    update = inner_step(
        model,
        batch.context_ids,
        batch.context_mask,
        batch.context_group,
        inner_lr=config.inner_lr,  # type: ignore[arg-type]  # a number, of MetaTrainingArguments
        inner_steps=config.inner_steps,
        inner_params=config.inner_params,
        verify=config.verify,
        context_loss_mask=batch.context_loss_mask,
    )
    with update.applied_to(model, groups=batch.query_group):
        logits_BTV = _logits(model, batch.query_ids)
    losses_R = _token_losses(logits_BTV[:, :-1][batch.response_mask[:, 1:]], batch, teacher)
    loss_B = _sums(losses_R, batch.response_mask)
    if config.outer_reduction == "mean":
        loss_B = loss_B / batch.response_mask.sum(1)
    loss = loss_B.mean()
    if config.lm_weight:
        loss = loss + config.lm_weight * _lm_loss(model, batch)
    return loss, logits_BTV


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _token_losses(logits_RV: Tensor, batch: MetaBatch, teacher: TeacherTargets | None) -> Tensor:
    """KL(teacher ‖ model) at each response token, or the token's NLL, [R]."""
    if teacher is None:
        return F.cross_entropy(logits_RV, batch.query_ids[batch.response_mask], reduction="none")
    taught_RV = teacher.materialised_logits().to(logits_RV.dtype).log_softmax(-1)
    return F.kl_div(logits_RV.log_softmax(-1), taught_RV, reduction="none", log_target=True).sum(-1)


def _sums(values_R: Tensor, mask_BT: Tensor) -> Tensor:
    """The sum of each row's values, of which there is one for every True of the mask, [B]."""
    spread = values_R.new_zeros(mask_BT.shape)
    spread[mask_BT] = values_R
    return spread.sum(1)


def _lm_loss(model: nn.Module, batch: MetaBatch) -> Tensor:
    """The mean over contexts of the mean next-token NLL at θ, of the tokens that count."""
    counts = batch.context_loss_mask[:, 1:]
    logits_RV = _logits(model, batch.context_ids)[:, :-1][counts]
    nll_R = F.cross_entropy(logits_RV, batch.context_ids[:, 1:][counts], reduction="none")
    return (_sums(nll_R, counts) / counts.sum(1)).mean()
