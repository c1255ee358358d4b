"""What is checked: the engine's losses, gradients and logits, from the very code that trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..meta.config import MetaStepOutput
from ..meta.failures import Failures
from ..meta.inner import contexts_of, take_inner_steps
from ..meta.step import fast_meta_step
from ..models.architecture import compute_dtype
from ..models.inner_params import select_inner
from ..ops.backend import use_backend
from ..ops.phase import Phase
from ..rows import GroupedRows
from ..update.adapted_layer import StepState
from ..update.attach import AdaptedModel
from .objective import LOGITS, StepArguments
from .weights import Vector


def meta_gradient(
    model: nn.Module, step: StepArguments, first_order: bool = False
) -> tuple[MetaStepOutput, Vector]:
    """What ``fast_meta_step`` returns and adds to ``.grad``, which is None before and after."""
    config = replace(step.config, first_order=first_order)
    out = fast_meta_step(
        model, step.batch, teacher=step.teacher, lm_batch=step.lm_batch, config=config
    )
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return out, gradient


class RowLogits(NamedTuple):
    """A part of a row of the batch: its ids [T], positions [J], group, and the logits [J, V]."""

    ids: Tensor
    positions: Tensor
    group: int
    logits: Tensor


def logits_at_theta(model: nn.Module, step: StepArguments) -> Iterator[RowLogits]:
    """The logits of every context and query in the engine's forward at θ."""
    batch = step.batch
    one_group = StepState(1, 0.0, Phase(second_order=False), compute_dtype(model))
    with _forward(model, step):
        engine = AdaptedModel(model, {}, one_group)
        with engine.differentiable(step.recompute):
            hidden = [
                engine.hidden_states(ids, GroupedRows(torch.zeros_like(group), 1), 0).detach()
                for ids, group in (
                    (batch.context_ids, batch.context_group),
                    (batch.query_ids, batch.query_group),
                )
            ]
    contexts = (batch.context_ids, batch.context_mask, torch.zeros_like(batch.context_group))
    yield from _logits(engine, hidden[0], *contexts)
    queries = (batch.query_ids, batch.query_mask, torch.zeros_like(batch.query_group))
    yield from _logits(engine, hidden[1], *queries)


def logits_at_adapted(model: nn.Module, step: StepArguments) -> Iterator[RowLogits]:
    """The logits of every query in the engine's forward at the θ' of its group."""
    batch, phase = step.batch, Phase(second_order=False)
    state = StepState(batch.groups, float(step.inner_lr), phase, compute_dtype(model))
    with _forward(model, step):
        engine = AdaptedModel(model, select_inner(model, step.inner_params), state)
        with engine.differentiable(step.recompute):
            failures = Failures(batch.context_ids.device)
            take_inner_steps(engine, contexts_of(batch), step.inner_steps, failures)
            queries = batch.layout.queries
            hidden = engine.hidden_states(batch.query_ids, queries, step.inner_steps).detach()
            failures.take(state.flags)
    failures.check()
    yield from _logits(engine, hidden, batch.query_ids, batch.query_mask, batch.query_group)


@contextmanager
def _forward(model: nn.Module, step: StepArguments) -> Iterator[None]:
    """The surroundings of a step's forward, as in ``fast_meta_step``."""
    device = step.batch.context_ids.device
    autocast = torch.autocast(device.type, enabled=False)
    with torch.enable_grad(), autocast, use_backend(step.backend):
        yield


def _logits(
    engine: AdaptedModel, hidden_BTD: Tensor, ids: Tensor, mask: Tensor, group: Tensor
) -> Iterator[RowLogits]:
    """The head on parts of rows; nothing of the model is replaced any more."""
    at_once = max(1, LOGITS // len(engine.head.weight))
    for row in range(len(ids)):
        real = ids[row][mask[row]]
        for part in torch.arange(len(real), device=ids.device).split(at_once):
            engine.state.rows = GroupedRows(group[row : row + 1], engine.state.groups)
            with torch.autocast(ids.device.type, enabled=False):
                logits = engine.vocabulary.logits(hidden_BTD[row : row + 1, part])
            yield RowLogits(real, part, int(group[row]), logits[0])
