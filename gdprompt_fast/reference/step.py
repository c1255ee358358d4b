"""The meta step written as the paper writes it. Everything in the engine is compared with this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..batch import MetaBatch
from ..errors import UserError
from ..meta.config import OPTIONS, MetaStepConfig, MetaStepOutput, Rate, check_step, named
from ..meta.failures import Failures, check_inner_loss, clean_after_error
from ..meta.lm_batch import LMBatch
from ..meta.targets import TeacherTargets
from ..models.architecture import compute_dtype
from ..models.graph import check_twice_differentiable
from ..models.inner_params import layers_of, select_inner
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
    config: MetaStepConfig,
) -> tuple[Parameters, Tensor]:
    """θ' of one group, with its graph, and the group's inner loss at θ."""
    real = batch.layout.real.contexts
    rows = (batch.context_group[:real] == group).nonzero().flatten()
    ids, mask = batch.context_ids[rows], batch.context_loss_mask[rows]
    theta, at_theta, layers = dict(inner), None, layers_of(model, inner)  # type: ignore[arg-type]
    for step in range(config.inner_steps):
        loss = next_token_nll(logits_at(model, theta, ids), ids, mask).mean()
        check_inner_loss(loss.detach()[None], step, first_group=group)
        at_theta = loss.detach() if at_theta is None else at_theta
        if step == 0:
            check_twice_differentiable(loss, "the context pass to be")
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=not config.first_order)
        theta = {
            name: weight - rate_of(config.inner_lr, layers[name], group) * grad
            for (name, weight), grad in zip(theta.items(), grads, strict=True)
        }
    assert at_theta is not None
    return theta, at_theta


def reference_meta_step(
    model: nn.Module, batch: MetaBatch, *given: Any, **options: Any
) -> MetaStepOutput:
    """:func:`gdprompt_fast.fast_meta_step` by materialised autograd, one group at a time.

    The same arguments, result and effect on ``.grad``; θ' is a dense copy of the inner parameters,
    and the meta-gradient is autograd's own double backward. Memory: one adapted copy with its
    gradient and graph.

    Args:
        given, options: those of :func:`gdprompt_fast.fast_meta_step`, by position or name.
    """
    options = named(OPTIONS, given, options)
    teacher: TeacherTargets | None = options.pop("teacher", None)
    lm_batch = options.pop("lm_batch", None)
    query_count, lm_count = options.pop("query_count", None), options.pop("lm_count", None)
    config = options.pop("config", None) or MetaStepConfig(**options)
    rows = None if lm_batch is None else LMBatch.of(lm_batch)
    check_step(model, batch, config, teacher, rows, query_count, lm_count)
    if compute_dtype(model) is not None:
        raise UserError("model: expected no autocast around the reference, got an active one")
    inner = {
        name: p if p.requires_grad else p.detach().requires_grad_()
        for name, p in select_inner(model, config.inner_params).items()
    }
    teacher_logits = teacher.materialised_logits() if teacher is not None else None
    trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    trained += learnt_rates(config.inner_lr)
    real = batch.layout.real
    inner_loss, query_loss = [], []
    with clean_after_error(model), attention_by(model, None):
        for group in range(real.groups):
            theta, loss_at_theta = adapt(model, inner, batch, group, config)
            inner_loss.append(loss_at_theta)
            queries = (batch.query_group[: real.queries] == group).nonzero().flatten()
            if len(queries) == 0:
                continue
            losses = response_losses(
                logits_at(model, theta, batch.query_ids[queries]), batch, queries, teacher_logits
            )
            if config.outer_reduction == "mean":
                lengths = batch.response_mask[queries].sum(1)
                losses = losses / lengths.repeat_interleave(lengths)
            loss = losses.sum() / (real.queries if query_count is None else query_count)
            query_loss.append(loss.detach())
            loss.backward(inputs=trained)
        contexts = batch.context_ids[: real.contexts], batch.context_loss_mask[: real.contexts]
        ids, mask = contexts if rows is None else (rows.ids, rows.mask)
        lm = next_token_nll(logits_at(model, {}, ids), ids, mask).sum()
        lm = lm / (len(ids) if lm_count is None else lm_count)
        (config.lm_weight * lm).backward()
    query_total = torch.stack(query_loss).sum()
    return MetaStepOutput(
        outer_loss=query_total + config.lm_weight * lm.detach(),
        query_loss=query_total,
        lm_loss=lm.detach(),
        inner_loss=torch.stack(inner_loss).mean(),
        backend="reference",
        eager="the reference",
        failures=Failures(batch.context_ids.device),
    )


def rate_of(inner_lr: Rate, layer: str, group: int) -> float | Tensor:
    """η of a layer of a group."""
    rate = inner_lr[layer] if isinstance(inner_lr, Mapping) else inner_lr
    return rate[group] if isinstance(rate, Tensor) and rate.dim() else rate


def learnt_rates(inner_lr: Rate) -> list[Tensor]:
    """The rates that get a gradient."""
    rates = inner_lr.values() if isinstance(inner_lr, Mapping) else [inner_lr]
    return [rate for rate in rates if isinstance(rate, Tensor) and rate.requires_grad]
