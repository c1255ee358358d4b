"""The computation of a checked step: from here on nothing of the device is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.backend import use_backend
from ..ops.phase import Phase
from ..update.adapted_layer import StepState, Weights, always_there
from ..update.attach import AdaptedModel
from .capture import Done, Graphs, Unit
from .config import MetaStepConfig, MetaStepOutput
from .failures import Failures, clean_after_error
from .inner import contexts_of, take_inner_steps
from .lm_batch import LMBatch
from .outer import lm_backward, query_loss
from .parts import Numbers, Part


class PartInputs(NamedTuple):
    """What a part of a step depends on, beside the model."""

    part: Part
    numbers: Numbers
    lm_on_contexts: bool

    def map(self, change: Callable[[Tensor], Tensor]) -> PartInputs:
        return self._replace(part=self.part.map(change), numbers=self.numbers.map(change))

    @property
    def key(self) -> Any:
        """Equal where the same work is to be done."""
        return self.part.key, self.numbers.key, self.lm_on_contexts


class LMInputs(NamedTuple):
    """What a part of L_LM depends on, beside the model."""

    rows: LMBatch
    numbers: Numbers

    def map(self, change: Callable[[Tensor], Tensor]) -> LMInputs:
        return self._replace(rows=self.rows.map(change), numbers=self.numbers.map(change))

    @property
    def key(self) -> Any:
        """Equal where the same work is to be done."""
        return "lm", tuple(self.rows.ids.shape), len(self.rows.position_P), self.numbers.key


@dataclass(frozen=True)
class MetaStep:
    """A meta step whose arguments are checked.

    Attributes:
        inner: the parameters that the inner step moves, by name.
        trained: those that get a meta-gradient.
        backend: that runs.
        dtype: of activations and products under mixed precision; None for the weights' own.
        weights: of blocks, where they are not there else; see :class:`StepState`.
    """

    model: nn.Module
    inner: dict[str, nn.Parameter]
    trained: list[nn.Parameter]
    config: MetaStepConfig
    backend: str
    dtype: torch.dtype | None
    weights: Weights = always_there

    @property
    def kind(self) -> Any:
        """What is the same in all steps that a graph stands for, beside the model."""
        config = replace(self.config, inner_lr=0.0, lm_weight=0.0, inner_params="full")
        return config, self.has_lm, tuple(self.inner), self.backend, self.dtype

    @property
    def has_lm(self) -> bool:
        """Whether L_LM is part of the outer loss."""
        weight = self.config.lm_weight
        return isinstance(weight, Tensor) or weight > 0

    def run(
        self,
        parts: Sequence[Part],
        lm_parts: Sequence[LMBatch],
        numbers: Numbers,
        graphs: Graphs | None,
        eager: str,
    ) -> MetaStepOutput:
        """Adds the meta-gradient of all parts to ``.grad``.

        Args:
            graphs: that parts may be replayed from; None for none, because of ``eager``.
        """
        device = parts[0].batch.context_ids.device
        failures, reasons = Failures(device), [eager]

        def run(unit: Unit, inputs: PartInputs | LMInputs) -> Sequence[Tensor]:
            if graphs is None:
                done = unit(inputs)
            else:
                done, why = graphs.run(inputs.key, unit, inputs, self.trained)
                reasons.append(why)
            losses = len(done.tensors) - len(done.errors)
            failures.add(done.errors, done.tensors[losses:])
            return done.tensors[:losses]

        autocast = torch.autocast(device.type, enabled=False)  # adapted layers cast themselves
        backend, clean = use_backend(self.backend), clean_after_error(self.model)
        with torch.enable_grad(), autocast, backend, clean:
            lm_on_contexts = not lm_parts
            shares = [
                run(self.backward, PartInputs(part, numbers, lm_on_contexts)) for part in parts
            ]
            query, lm, inner = map(_sum, zip(*shares, strict=True))
            if lm_parts:
                lm = _sum([run(self.lm_backward, LMInputs(r, numbers))[0] for r in lm_parts])
        return MetaStepOutput(
            outer_loss=query + numbers.lm_weight * lm,
            query_loss=query,
            lm_loss=lm,
            inner_loss=inner / numbers.group_count,
            backend=self.backend,
            eager=next(filter(None, reasons), ""),
            failures=failures,
        )

    def backward(self, inputs: PartInputs) -> Done:
        """Adds the meta-gradient of some groups to ``.grad``.

        Returns:
            Their shares of the query loss and of the contexts' L_LM, and the sum of their inner
            losses, detached; then the flags of what could be an error.
        """
        part, numbers, steps = inputs.part, inputs.numbers, self.config.inner_steps
        failures = Failures(part.batch.context_ids.device)
        phase = Phase(second_order=not self.config.first_order)
        own = part.rate(numbers.inner_lr)
        layers = own if isinstance(own, Mapping) else None
        rate = 0.0 if isinstance(own, Mapping) else own  # of layers that are not moved
        state = StepState(part.batch.groups, rate, phase, self.dtype, layers, self.weights)
        adapted = AdaptedModel(self.model, self.inner, state)
        with adapted.differentiable(self.config.recompute):
            keep_graph = inputs.lm_on_contexts and self.has_lm
            first_group = part.groups[0] if part.groups else 0
            nll_C, inner_loss = take_inner_steps(
                adapted, contexts_of(part.batch), steps, failures, keep_graph, first_group
            )
            options = steps, self.config.outer_reduction, numbers.query_count
            query = query_loss(adapted, part.batch, part.teacher, *options)
            failures.take(state.flags)
            lm = nll_C.sum() / numbers.lm_count
            (query + numbers.lm_weight * lm if keep_graph else query).backward()
            adapted.release()
        losses = query.detach(), lm.detach(), inner_loss
        return Done([*losses, *failures.flags], failures.errors)

    def lm_backward(self, inputs: LMInputs) -> Done:
        """Adds λ times the gradient of L_LM on some rows to ``.grad``; their share of L_LM."""
        numbers = inputs.numbers
        weight = numbers.lm_weight if self.has_lm else None
        options = numbers.lm_count, weight, self.dtype, self.config.recompute, self.weights
        return Done([lm_backward(self.model, inputs.rows, *options)], [])


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum()
