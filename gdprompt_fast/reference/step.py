"""The meta step written as the paper writes it. Everything in the engine is compared with this."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..batch import MetaBatch
from ..errors import UserError
from ..meta.config import LMBatch, MetaStepOutput, check_step
from ..meta.failures import check_inner_loss, clean_after_error
from ..meta.targets import TeacherTargets
from ..models.architecture import compute_dtype
from ..models.graph import check_twice_differentiable
from ..models.inner_params import InnerParams, select_inner
from ..update.masks import attention_by

Parameters = dict[str, Tensor]


def logits_at(model: nn.Module, theta: Parameters, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of the model with the parameters ``theta`` in place of its own."""
    return functional_call(model, theta, kwargs={"input_ids": ids, "use_cache": False}).logits


def next_token_nll(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Each row's mean next-token NLL, [B]."""
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return (nll * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


def response_losses(
    logits: Tensor, batch: MetaBatch, rows: Tensor, teacher_logits: Tensor | None
) -> Tensor:
    """KL(teacher ‖ student), or NLL without a teacher, of every response token of the queries
    ``rows``.
    """
    mask = batch.response_mask[rows]
    student = logits[:, :-1][mask[:, 1:]].log_softmax(-1)
    if teacher_logits is None:
        return F.nll_loss(student, batch.query_ids[rows][mask], reduction="none")
    position = torch.zeros(batch.response_mask.shape, dtype=torch.long, device=mask.device)
    position[batch.response_mask] = torch.arange(len(teacher_logits), device=mask.device)
    target = teacher_logits[position[rows][mask]].log_softmax(-1)
    return (target.exp() * (target - student)).sum(-1)


def adapt(
    model: nn.Module,
    inner: Parameters,
    batch: MetaBatch,
    group: int,
    inner_lr: float,
    inner_steps: int,
    first_order: bool,
) -> tuple[Parameters, Tensor]:
    """θ' of one group, with its graph, and the group's inner loss at θ."""
    rows = (batch.context_group == group).nonzero().flatten()
    ids, mask = batch.context_ids[rows], batch.context_loss_mask[rows]
    theta, at_theta = dict(inner), None
    for step in range(inner_steps):
        loss = next_token_nll(logits_at(model, theta, ids), ids, mask).mean()
        check_inner_loss(loss.detach()[None], step, first_group=group)
        at_theta = loss.detach() if at_theta is None else at_theta
        if step == 0:
            check_twice_differentiable(loss, "the context pass to be")
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
        theta = {n: w - inner_lr * g for (n, w), g in zip(theta.items(), grads, strict=True)}
    assert at_theta is not None
    return theta, at_theta


def reference_meta_step(
    model: nn.Module,
    batch: MetaBatch,
    inner_lr: float = 1e-3,
    inner_steps: int = 1,
    inner_params: InnerParams = "full",
    objective: str = "kl",
    teacher: TeacherTargets | None = None,
    outer_reduction: str = "sum",
    lm_weight: float = 0.0,
    lm_batch: LMBatch | None = None,
    first_order: bool = False,
    backend: str = "auto",
    recompute: str = "none",
    verify: str = "first",
    micro_groups: int | None = None,
    query_count: int | None = None,
    lm_count: int | None = None,
) -> MetaStepOutput:
    """:func:`gdprompt_fast.fast_meta_step` by materialised autograd, one group at a time.

    The same arguments, result and effect on ``.grad``; θ' is a dense copy of the inner parameters,
    and the meta-gradient is autograd's own double backward. Memory: one adapted copy with its
    gradient and graph.
    """
    check_step(
        model,
        batch,
        inner_lr,
        inner_steps,
        objective,
        teacher,
        outer_reduction,
        lm_weight,
        lm_batch,
        first_order,
        backend,
        recompute,
        verify,
        micro_groups,
        query_count,
        lm_count,
    )
    if compute_dtype(model) is not None:
        raise UserError("model: expected no autocast around the reference, got an active one")
    inner = {
        name: p if p.requires_grad else p.detach().requires_grad_()
        for name, p in select_inner(model, inner_params).items()
    }
    teacher_logits = teacher.materialised_logits() if teacher is not None else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inner_loss, query_loss = [], []
    with clean_after_error(model), attention_by(model, None):
        for group in range(batch.groups):
            theta, loss_at_theta = adapt(
                model, inner, batch, group, inner_lr, inner_steps, first_order
            )
            inner_loss.append(loss_at_theta)
            queries = (batch.query_group == group).nonzero().flatten()
            if len(queries) == 0:
                continue
            losses = response_losses(
                logits_at(model, theta, batch.query_ids[queries]), batch, queries, teacher_logits
            )
            if outer_reduction == "mean":
                lengths = batch.response_mask[queries].sum(1)
                losses = losses / lengths.repeat_interleave(lengths)
            loss = losses.sum() / (query_count or len(batch.query_ids))
            query_loss.append(loss.detach())
            loss.backward(inputs=trained)
        contexts = batch.context_ids, batch.context_loss_mask
        ids, mask = contexts if lm_batch is None else lm_batch
        lm = next_token_nll(logits_at(model, {}, ids), ids, mask).sum() / (lm_count or len(ids))
        (lm_weight * lm).backward()
    query_total = torch.stack(query_loss).sum()
    return MetaStepOutput(
        outer_loss=query_total + lm_weight * lm.detach(),
        query_loss=query_total,
        lm_loss=lm.detach(),
        inner_loss=torch.stack(inner_loss).mean(),
        backend="reference",
    )
