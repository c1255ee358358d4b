"""The true objective of a meta step, from a model's own forward and its first derivatives alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdprompt_fast import MetaBatch
from gdprompt_fast.models.inner_params import select_inner
from gdprompt_fast.reference.compare import without_upcasts

Gradients = dict[str, Tensor]


def objective(
    model: nn.Module,
    batch: MetaBatch,
    inner_lr: float,
    inner_params: Any = "full",
    inner_steps: int = 1,
    lm_weight: float = 0.0,
) -> float:
    """outer(θ − η ∇L(θ)) + λ L_LM(θ) with gold responses, a group at a time."""
    inner = list(select_inner(model, inner_params).values())
    trained = [(p, p.requires_grad) for p in model.parameters()]
    total, at_theta = 0.0, []  # and the contexts' losses at θ
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is p for p in inner))
        for group in range(batch.groups):
            rows = (batch.context_group == group).nonzero().flatten().tolist()
            before = [p.detach().clone() for p in inner]
            for step in range(inner_steps):
                losses = torch.stack([_nll(model, batch, row) for row in rows])
                if step == 0:
                    at_theta.append(losses.detach())
                loss = losses.mean()
                gradients = torch.autograd.grad(loss, inner, allow_unused=True)
                with torch.no_grad():
                    for p, g in zip(inner, gradients, strict=True):
                        if g is not None:
                            p.sub_(inner_lr * g)
            with torch.no_grad():
                for q in (batch.query_group == group).nonzero().flatten().tolist():
                    total += _response(model, batch, q) / len(batch.query_ids)
                for p, b in zip(inner, before, strict=True):
                    p.copy_(b)
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
    return total + lm_weight * float(torch.cat(at_theta).mean())


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(input_ids=ids[None], use_cache=False)
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits[0]


def _nll(model: nn.Module, batch: MetaBatch, row: int) -> Tensor:
    real = batch.context_mask[row]
    ids, counted = batch.context_ids[row][real], batch.context_loss_mask[row][real][1:]
    return F.cross_entropy(_logits(model, ids)[:-1][counted], ids[1:][counted])


def _response(model: nn.Module, batch: MetaBatch, row: int) -> float:
    ids = batch.query_ids[row][batch.query_mask[row]]
    response = batch.response_mask[row][batch.query_mask[row]]
    losses = F.cross_entropy(_logits(model, ids)[:-1], ids[1:], reduction="none")
    return float(losses[response[1:]].sum())


@contextmanager
def moved(model: nn.Module, direction: Gradients, by: float) -> Iterator[None]:
    """Inside, the model is at θ + by · direction; afterwards at θ again, bit for bit."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in direction}
    try:
        with torch.no_grad():
            for name, v in direction.items():
                parameters[name].add_(v, alpha=by)
        yield
    finally:
        with torch.no_grad():
            for name, kept in before.items():
                parameters[name].copy_(kept)


def derivative(
    model: nn.Module, direction: Gradients, at: Callable[[], float], step: float
) -> float:
    """The directional derivative of ``at()``, by central differences of fourth order."""
    values = {}
    with without_upcasts(model):
        for by in (-2, -1, 1, 2):
            with moved(model, direction, by * step):
                values[by] = at()
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)


def unit(direction: Gradients) -> Gradients:
    norm = torch.stack([v.norm() for v in direction.values()]).norm()
    return {name: v / norm for name, v in direction.items()}


def random_direction(model: nn.Module, seed: int) -> Gradients:
    generator = torch.Generator().manual_seed(seed)
    trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in trained}


def dot(one: Gradients, other: Gradients) -> float:
    return float(sum((v * other[name]).sum() for name, v in one.items() if name in other))
