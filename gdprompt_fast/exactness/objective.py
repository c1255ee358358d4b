"""The objective of a meta step by the model's own forward: what the engine is checked against.

Nothing of the engine is in here: no adapted layers, no ops of its own, no second derivative. Every
row runs alone and without padding, as ``model(input_ids=row)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import MetaBatch
from ..meta.config import MetaStepConfig
from ..meta.lm_batch import LMBatch
from ..meta.targets import TeacherTargets
from ..models.inner_params import select_inner
from .weights import Vector, moved

LOGITS = 1 << 25  # most elements of logits at once: 256 MB in fp64

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class StepArguments(MetaStepConfig):
    """A configuration with numbers for rates, and the data of a step."""

    inner_lr: float = 1e-3
    lm_weight: float = 0.0
    batch: MetaBatch
    teacher: TeacherTargets | None
    lm_batch: LMBatch | None

    @property
    def config(self) -> MetaStepConfig:
        """Without the data."""
        return MetaStepConfig(**{f.name: getattr(self, f.name) for f in fields(MetaStepConfig)})

    def in_dtype(self, dtype: torch.dtype) -> StepArguments:
        """The same with the teacher's targets in ``dtype``, so that nobody rounds them."""
        if self.teacher is None:
            return self
        given = vars(self.teacher)
        cast = {name: None if t is None else t.to(dtype) for name, t in given.items()}
        return replace(self, teacher=TeacherTargets(**cast))


class Objective:
    """φ(θ) = mean over queries of outer(θ − η ∇L(θ)) + λ L_LM(θ), at the weights the model has.

    Attributes:
        inner: the parameters the inner step moves, by name.
        trained: those with ``requires_grad``: φ is a function of them.
    """

    def __init__(self, model: nn.Module, step: StepArguments) -> None:
        self.model, self.step = model, step
        self.inner = select_inner(model, step.inner_params)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[operator]
        lengths = step.batch.response_mask.sum(1).tolist()
        self._targets_of = torch.arange(sum(lengths)).split(lengths)

    @property
    def groups_with_queries(self) -> list[int]:
        return sorted(set(self.step.batch.query_group.tolist()))

    def value(self) -> float:
        """φ."""
        inner: dict[int, float] = {}
        query_loss = self.query_loss(inner)
        return query_loss + self.step.lm_weight * self.lm_loss(inner)

    def query_loss(self, inner: dict[int, float] | None = None) -> float:
        """The mean over queries of the outer loss at θ'; ``inner`` is given the groups' L at θ."""
        total = []
        for group in self.groups_with_queries:
            with self.adapted(group) as loss, torch.no_grad():
                total += [float(loss) for loss in self._outer(group)]
            if inner is not None:
                inner[group] = loss
        return math.fsum(total)

    def lm_loss(self, inner: dict[int, float] | None = None) -> float:
        """L_LM at θ; 0 where λ is.

        Args:
            inner: L at θ of groups, of which that of the same contexts is the mean.
        """
        if self.step.lm_weight == 0:
            return 0.0
        with torch.no_grad():
            if self.step.lm_batch is not None:
                return math.fsum(float(loss) for loss in self._lm())
            known = inner or {}
            sizes = self.step.batch.context_group.bincount().tolist()
            return math.fsum(
                size / sum(sizes) * (known[group] if group in known else self._inner_loss(group))
                for group, size in enumerate(sizes)
            )

    def inner_loss(self) -> float:
        """The mean over groups of the inner loss at θ."""
        groups = self.step.batch.groups
        with torch.no_grad():
            return math.fsum(map(self._inner_loss, range(groups))) / groups

    def _inner_loss(self, group: int) -> float:
        return math.fsum(float(loss) for loss in self._inner(group))

    @contextmanager
    def adapted(self, group: int) -> Iterator[float]:
        """Inside, the model is at θ' of a group: θ − η ∇L, materialised. Yields L(θ)."""
        with ExitStack() as steps:
            losses = []
            for _ in range(self.step.inner_steps):
                gradient, loss = self._gradient(lambda: self._inner(group), self.inner)
                steps.enter_context(moved(self.model, gradient, -self.step.inner_lr))
                del gradient
                losses.append(loss)
            yield losses[0]

    def inner_gradient(self, group: int, of: dict[str, nn.Parameter]) -> Vector:
        """∇L of a group at the weights the model has."""
        return self._gradient(lambda: self._inner(group), of)[0]

    def outer_gradient(self, group: int) -> Vector:
        """∂outer/∂θ' of a group's queries, of all that is trained or moved."""
        with self.adapted(group):
            return self._gradient(lambda: self._outer(group), {**self.inner, **self.trained})[0]

    def lm_gradient(self) -> Vector:
        """λ ∇L_LM."""
        if self.step.lm_weight == 0:
            return {}
        gradient, _ = self._gradient(self._lm, self.trained)
        return {name: self.step.lm_weight * tensor for name, tensor in gradient.items()}

    def _gradient(
        self, losses: Callable[[], Iterator[Tensor]], of: dict[str, nn.Parameter]
    ) -> tuple[Vector, float]:
        """The gradient of the sum of ``losses``, one graph at a time, and the sum."""
        frozen = [p for p in of.values() if not p.requires_grad]
        total: Vector = {}
        values = []
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                for loss in losses():
                    values.append(float(loss.detach()))
                    grads = torch.autograd.grad(loss, list(of.values()), allow_unused=True)
                    for name, grad in zip(of, grads, strict=True):
                        if grad is not None:
                            total[name] = total[name].add_(grad) if name in total else grad.clone()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        return total, math.fsum(values)

    def _inner(self, group: int) -> Iterator[Tensor]:
        batch = self.step.batch
        rows = (batch.context_group == group).nonzero().flatten().tolist()
        for row in rows:
            real = batch.context_mask[row]
            counted = batch.context_loss_mask[row][real]
            yield from self._next_token_nll(batch.context_ids[row][real], counted, 1 / len(rows))

    def _lm(self) -> Iterator[Tensor]:
        batch = self.step.batch
        pair = self.step.lm_batch
        if pair is None:
            rows = (batch.context_ids, batch.context_mask, batch.context_loss_mask)
        else:
            rows = (pair.ids, pair.mask, pair.mask)
        for ids, real, counted in zip(*rows, strict=True):
            yield from self._next_token_nll(ids[real], counted[real], 1 / len(rows[0]))

    def _outer(self, group: int) -> Iterator[Tensor]:
        batch, step = self.step.batch, self.step
        for row in (batch.query_group == group).nonzero().flatten().tolist():
            ids = batch.query_ids[row][batch.query_mask[row]]
            at = batch.response_mask[row].nonzero().flatten()
            tokens = len(at) if step.outer_reduction == "mean" else 1
            for part in at.split(self._positions_at_once()):
                logits = self.logits(ids, part - 1).double().log_softmax(-1)
                start = int((at < part[0]).sum())
                losses = self._against_target(logits, ids[part], row, start)
                yield losses.sum() / (tokens * len(batch.query_ids))

    def _against_target(self, log_p: Tensor, gold: Tensor, row: int, start: int) -> Tensor:
        """KL(teacher ‖ student), or NLL, of response tokens of a query from number ``start`` on."""
        teacher = self.step.teacher
        if teacher is None:
            return F.nll_loss(log_p, gold, reduction="none")
        which = self._targets_of[row][start : start + len(gold)]
        if teacher.logits is not None:
            target = teacher.logits[which].double()
        else:
            assert teacher.hidden is not None and teacher.head is not None
            target = (teacher.hidden[which] @ teacher.head.T).double()
        target = target.log_softmax(-1)
        ruled_out = target == -torch.inf
        return (target.exp() * (target - log_p).masked_fill(ruled_out, 0)).sum(-1)

    def _next_token_nll(self, ids_T: Tensor, counted_T: Tensor, weight: float) -> Iterator[Tensor]:
        """The mean next-token NLL of a row's tokens that count, times ``weight``, in parts."""
        predicting = counted_T[1:].nonzero().flatten()
        for part in predicting.split(self._positions_at_once()):
            nll = F.cross_entropy(
                self.logits(ids_T, part).double(), ids_T[part + 1], reduction="sum"
            )
            yield nll * (weight / len(predicting))

    def _positions_at_once(self) -> int:
        return max(1, LOGITS // self.vocabulary)

    def logits(self, ids_T: Tensor, positions: Tensor) -> Tensor:
        """The model's logits [J, V] of a row at ``positions`` [J].

        Only a row whose logits are too many takes ``logits_to_keep``, an argument that a model's
        wrapper need not know.
        """
        inputs: dict[str, Any] = dict(input_ids=ids_T[None], use_cache=False)
        if len(ids_T) > self._positions_at_once():
            kept: Tensor = self.model(**inputs, logits_to_keep=positions).logits[0]
            return kept
        logits: Tensor = self.model(**inputs).logits[0]
        return logits[positions]
