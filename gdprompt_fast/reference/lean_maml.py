"""Exact MAML by autograd's double backward, written to be lean: what the engine is measured
against, and what a memory plan predicts beside it.

With θ the inner parameters, the meta-gradient is the mean over examples i of

    v_i − η H_i v_i,    v_i = ∇_θ' outer_i at θ'_i = θ − η ∇_θ L(c_i, θ),    H_i = ∇²_θ L(c_i, θ)

No logits are made that the losses do not need, what can be let go of is, and PyTorch's fused
attention serves wherever it has the derivatives. For clarity instead, see ``step.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..batch import MetaBatch
from ..errors import UserError
from ..meta.targets import TeacherTargets
from ..models.inner_params import InnerParams, select_inner
from ..update.masks import attention_by
from .step import Parameters

NO_TARGET = -100  # what cross_entropy ignores


class Episode(NamedTuple):
    """One context and the query asked about it; or all of them, with a leading dimension."""

    context_ids: Tensor  # [Tc]
    context_targets: Tensor  # [Tc], the next token or NO_TARGET
    query_ids: Tensor  # [Tq]
    response_ids: Tensor  # [J], the token that position j predicts
    response_weight: Tensor  # [J], 1 where that is a response token
    teacher_hidden: Tensor  # [J, d], the teacher's final states there; d = 0 without a teacher


class LeanMAML:
    """What a step is taken on.

    Args:
        batch: one context and one query per group, in order.
        teacher: as hidden states and head; None for the gold objective.
        inner_params: what the inner step moves, as in :func:`gdprompt_fast.fast_meta_step`.

    Attributes:
        inner: the parameters the inner step moves; frozen ones as leaves of their own.
        outer: the parameters that get a gradient.
        trained: the same without their names, for ``backward``: the frozen leaves of ``inner`` get
            none, nor is any computed.
        head: the teacher's, [V, d]; [0, 0] without one.
        positions: [J], those of a query that predict a response token in some row.
        examples: all of them, [N, …].
    """

    def __init__(
        self,
        model: nn.Module,
        batch: MetaBatch,
        teacher: TeacherTargets | None,
        inner_lr: float = 1e-3,
        inner_params: InnerParams = "full",
        inner_steps: int = 1,
    ) -> None:
        rows = torch.arange(batch.groups, device=batch.context_ids.device)
        for group in (batch.context_group, batch.query_group):
            if not torch.equal(group, rows):
                raise UserError(f"batch: expected one context and query per group, got {group}")
        self.model, self.batch, self.teacher = model, batch, teacher
        self.inner_lr, self.inner_params = inner_lr, inner_params
        self.inner_steps = inner_steps
        self.inner: Parameters = {
            name: p if p.requires_grad else p.detach().requires_grad_()
            for name, p in select_inner(model, inner_params).items()
        }
        self.outer: Parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.trained = list(self.outer.values())
        no_head = torch.empty(0, 0, device=batch.context_ids.device)
        self.head = no_head if teacher is None or teacher.head is None else teacher.head
        self.positions = batch.response_mask[:, 1:].any(0).nonzero().flatten()
        self.examples = self._examples()

    def _examples(self) -> Episode:
        batch = self.batch
        targets = batch.context_ids.masked_fill(~batch.context_loss_mask, NO_TARGET).roll(-1, 1)
        targets[:, -1] = NO_TARGET
        predicts = batch.response_mask[:, 1:][:, self.positions]
        hidden = self.head.new_zeros(*predicts.shape, self.head.shape[1])
        if self.teacher is not None and self.teacher.hidden is not None:
            hidden[predicts] = self.teacher.hidden
        return Episode(
            batch.context_ids,
            targets,
            batch.query_ids,
            batch.query_ids[:, 1:][:, self.positions],
            predicts.to(hidden.dtype),
            hidden,
        )

    def __iter__(self) -> Iterator[Episode]:
        return (Episode(*rows) for rows in zip(*self.examples, strict=True))

    def __len__(self) -> int:
        return self.batch.groups

    def logits(self, theta: Parameters, ids: Tensor, **options: Any) -> Tensor:
        """[T, V] of one row ``ids`` [T], with ``theta`` in place of the model's own parameters."""
        inputs = dict(input_ids=ids[None], use_cache=False, **options)
        logits: Tensor = functional_call(self.model, theta, kwargs=inputs).logits
        return logits[0]

    def inner_loss(self, theta: Parameters, example: Episode) -> Tensor:
        """L(c, θ), the mean next-token NLL of the context."""
        logits = self.logits(theta, example.context_ids)
        return F.cross_entropy(logits, example.context_targets, ignore_index=NO_TARGET)

    def outer_loss(self, theta: Parameters, example: Episode) -> Tensor:
        """Σ_j KL(teacher ‖ student), or NLL without a teacher, over the response tokens."""
        logits = self.logits(theta, example.query_ids, logits_to_keep=self.positions)
        if self.teacher is None:
            losses = F.cross_entropy(logits, example.response_ids, reduction="none")
        else:
            target = (example.teacher_hidden @ self.head.T).log_softmax(-1)
            losses = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)
        return losses @ example.response_weight.to(losses.dtype)

    def adapted(self, gradient: Parameters, theta: Parameters | None = None) -> Parameters:
        """θ' = θ − η g; consumes g, so that its tensors are freed one by one."""
        theta = self.inner if theta is None else theta
        return {n: w.sub(gradient.pop(n), alpha=self.inner_lr) for n, w in theta.items()}

    def loss(self, example: Episode) -> Tensor:
        """The example's share of the outer loss, its graph through the inner steps."""
        theta = self.inner
        for _ in range(self.inner_steps):
            theta = self.adapted(self._gradient(theta, example), theta)
        return self.outer_loss(theta, example) / len(self)

    def _gradient(self, theta: Parameters, example: Episode) -> Parameters:
        # Only what is differentiated twice gives up PyTorch's fused attention.
        with attention_by(self.model, None):
            loss = self.inner_loss(theta, example)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        return dict(zip(theta, grads, strict=True))


def sequential(task: LeanMAML) -> None:
    """One example at a time, as with higher or TorchOpt; adds to ``.grad``.

    Holds one adapted copy of θ, its gradient, and one example's graph through both passes.
    """
    for example in task:
        task.loss(example).backward(inputs=task.trained)


def all_alive(task: LeanMAML) -> None:
    """All examples with a single backward at the end, as the paper describes; adds to ``.grad``.

    Holds an adapted copy of θ and a graph per example.
    """
    losses = [task.loss(example) for example in task]
    torch.stack(losses).sum().backward(inputs=task.trained)
