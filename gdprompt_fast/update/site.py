"""A site: one layer of the model at θ and at every group's θ'; and the registry of layer types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.gradient import WeightGradient
from ..ops.phase import Phase
from ..rows import GroupedRows


@dataclass
class StepState:
    """What all sites of one meta step share.

    Attributes:
        groups: G, the number of adapted models.
        inner_lr: η.
        phase: where the step is.
        dtype: of activations and products under mixed precision; None for the weights' own.
        rows: the groups of the rows now going through the model.
        level: the number of inner steps behind the weights in use now.
    """

    groups: int
    inner_lr: float
    phase: Phase
    dtype: torch.dtype | None = None
    rows: GroupedRows = field(init=False)
    level: int = 0

    def cast(self, tensor: Tensor) -> Tensor:
        """The tensor in the dtype of the step's products."""
        return tensor if self.dtype is None else tensor.to(self.dtype)


class Site:
    """A layer whose parameters the inner step may move.

    Attributes:
        tensors: what the forward reads in autograd at the current level: the parameters, every
            group's own where the inner step moves them, or a handle without elements where the
            update is kept in factors (see ops/linear.py). Either way autograd sees the dependence.
        moving: the number of them that the inner step moves, the first ones.
    """

    def __init__(self, state: StepState, tensors: list[Tensor], moving: int) -> None:
        self.state, self.tensors, self.moving = state, tensors, moving

    @property
    def moved(self) -> list[Tensor]:
        return self.tensors[: self.moving]

    def step(self, gradients: list[Tensor]) -> None:
        """Takes an inner step, moved − η ∂L/∂moved, with what autograd brought for ``moved``."""
        pairs = zip(self.moved, gradients, strict=True)
        after = [tensor - self.state.inner_lr * gradient for tensor, gradient in pairs]
        self.tensors = [*after, *self.tensors[self.moving :]]

    def release(self) -> None:
        """Drops the activations and cotangents kept for the backward passes."""
        self.tensors = []

    def forward(self, *inputs: Tensor) -> Tensor:
        """The module's forward at the current level, for the rows now going through the model."""
        raise NotImplementedError


class FactoredSite(Site):
    """A layer whose update is kept in factors: one handle stands for its weights in autograd."""

    def __init__(self, state: StepState, handle: Tensor, inner: bool) -> None:
        super().__init__(state, [handle], int(inner))

    @property
    def handle(self) -> Tensor:
        """The handle of the weights at the current level."""
        return self.tensors[0]


class MaterialisedSite(Site):
    """A layer of small parameters: every group has its own, [G, *shape].

    They are fp32 at least: an update rounded into bf16 would be lost.
    """

    def __init__(self, module: Any, inner: dict[str, bool], state: StepState) -> None:
        self.names = sorted(inner, key=lambda name: not inner[name])  # the moving ones first
        moving = sum(inner.values())
        parameters = [getattr(module, name) for name in self.names]
        own = [_per_group(parameter, state.groups) for parameter in parameters[:moving]]
        super().__init__(state, [*own, *parameters[moving:]], moving)

    def of_rows(self, name: str) -> Tensor | None:
        """Each row's parameter at the current level, [B, *shape]; None if the layer has none."""
        if name not in self.names:
            return None
        index, rows = self.names.index(name), self.state.rows
        tensor = self.tensors[index]
        if index < self.moving:
            return tensor[rows.group_B]
        return tensor.expand(len(rows), *tensor.shape)


def _per_group(parameter: Tensor, groups: int) -> Tensor:
    """[G, *shape], with a graph to the parameter if it is trained."""
    wide = parameter if parameter.dtype == torch.float64 else parameter.float()
    expanded = wide.expand(groups, *parameter.shape)
    return expanded if parameter.requires_grad else expanded.detach().requires_grad_()


Rule = Callable[[Any, dict[str, bool], StepState], Site]
_RULES: dict[str, Rule] = {}


def rule_for(*types: str) -> Callable[[Rule], Rule]:
    """Registers a rule for layers of these types, named ``module.Class`` so that none has to be
    imported.

    A rule takes the module, for each of its own parameters whether the inner step moves it, and the
    state.
    """

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(types, rule))
        return rule

    return register


def find_rule(module: nn.Module) -> Rule | None:
    """The rule for exactly this type: a subclass may compute something else."""
    return _RULES.get(f"{type(module).__module__}.{type(module).__qualname__}")


def outer_gradient(parameter: Tensor | None) -> WeightGradient | None:
    """Where the outer gradient of a parameter is summed; None if it is frozen or absent."""
    return WeightGradient(parameter) if parameter is not None and parameter.requires_grad else None
