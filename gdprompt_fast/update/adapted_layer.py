"""A layer of the model at θ and at every group's θ'; and the registry of layer types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops.gradient import WeightGradient
from ..ops.handle import depend_on
from ..ops.phase import Phase
from ..ops.rate import Rate
from ..rows import GroupedRows
from .change import WeightChange


@dataclass
class LayerChange:
    """What an inner step changed of a layer, for one group.

    Attributes:
        weight: of a matrix: W' − W [O, I], of an embedding [V, D].
        bias: of a matrix: b' − b [O].
        small: of small parameters: their new values, by name.
    """

    weight: WeightChange | None = None
    bias: Tensor | None = None
    small: dict[str, Tensor] = field(default_factory=dict)


class Weights(Protocol):
    """What a pass through a block, or one that reads the weight of the head or an embedding, runs
    in, where weights are not there else; with ``read=False`` one that adds to its gradient alone.
    """

    def __call__(self, module: nn.Module, read: bool = True) -> AbstractContextManager[None]: ...


def always_there(module: nn.Module, read: bool = True) -> AbstractContextManager[None]:
    """Of weights that need not be gathered."""
    return nullcontext()


@dataclass
class StepState:
    """What all adapted layers of one meta step share.

    Attributes:
        groups: G, the number of adapted models.
        inner_lr: η, of all groups or of each, [] or [G]; a tensor may require a gradient.
        phase: where the step is.
        dtype: of activations and products under mixed precision; None for the weights' own.
        weights: what passes run in that read weights.
        rates: η of single layers, by their name in the model; a tied embedding has its head's.
        flags: errors to be raised where a bool on the device turns out to be true.
        rows: the groups of the rows now going through the model.
        level: the number of inner steps behind the weights in use now.
    """

    groups: int
    inner_lr: Tensor | float
    phase: Phase
    dtype: torch.dtype | None = None
    rates: Mapping[str, Tensor] | None = None
    weights: Weights = always_there
    rows: GroupedRows = field(init=False)
    level: int = 0
    flags: list[tuple[Exception, Tensor]] = field(init=False, default_factory=list)
    _rates: dict[str | None, Rate] = field(init=False, default_factory=dict)

    def flag(self, error: Exception, failed: Tensor) -> None:
        """Notes what ``failed``, a bool on the device, would mean: nothing waits for it here."""
        self.flags.append((error, failed))

    def rate(self, layer: str, like: Tensor) -> Rate:
        """η of a layer, on the device of its weight ``like``."""
        own = (self.rates or {}).get(layer)
        key, eta = (None, self.inner_lr) if own is None else (layer, own)
        if key not in self._rates:
            if not isinstance(eta, Tensor):
                dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
                eta = torch.full((), eta, dtype=dtype, device=like.device)
            self._rates[key] = Rate(eta.expand(self.groups))
        return self._rates[key]

    def check_rates(self) -> None:
        """
        Raises:
            UserError: for a rate of no layer, once all layers have taken theirs.
        """
        unknown = sorted((self.rates or {}).keys() - self._rates.keys())
        if unknown:
            raise UserError(
                "rates: expected names of layers with parameters, a tied embedding under its "
                f"head's, got {unknown[0]}"
            )

    def cast(self, tensor: Tensor) -> Tensor:
        """The tensor in the dtype of the step's products."""
        return tensor if self.dtype is None else tensor.to(self.dtype)


class AdaptedLayer:
    """A layer whose parameters the inner step may move.

    Attributes:
        rate: η.
        tensors: what the forward reads in autograd at the current level: the parameters, every
            group's own where the inner step moves them, or a handle without elements where the
            update is kept in factors (see ops/linear.py). Either way autograd sees the dependence.
        moving: the number of them that the inner step moves, the first ones.
    """

    def __init__(self, state: StepState, rate: Rate, tensors: list[Tensor], moving: int) -> None:
        self.state, self.rate, self.tensors, self.moving = state, rate, tensors, moving

    @property
    def moved(self) -> list[Tensor]:
        return self.tensors[: self.moving]

    def step(self, gradients: list[Tensor]) -> None:
        """Takes an inner step, moved − η ∂L/∂moved, with what autograd brought for ``moved``."""
        after = map(self.stepped, self.moved, gradients)
        self.tensors = [*after, *self.tensors[self.moving :]]

    def stepped(self, tensor: Tensor, gradient: Tensor) -> Tensor:
        """One of ``moved`` after an inner step."""
        return self.rate.step(tensor, gradient)

    def factor_tensors(self) -> list[Tensor]:
        """What makes θ' of θ: the factors, or θ' itself of small parameters."""
        return []

    def release(self) -> None:
        """Drops the activations and cotangents kept for the backward passes."""
        self.tensors = []

    def change(self, group: int) -> LayerChange:
        """θ' − θ of one group at the current level, of what the inner step moves."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        """The module's forward at the current level, for the rows now going through the model."""
        raise NotImplementedError


class FactoredLayer(AdaptedLayer):
    """A layer whose update is kept in factors: one handle stands for its weights in autograd."""

    def __init__(self, state: StepState, rate: Rate, handle: Tensor, inner: bool) -> None:
        super().__init__(state, rate, [handle], int(inner))

    @property
    def handle(self) -> Tensor:
        """The handle of the weights at the current level."""
        return self.tensors[0]

    def stepped(self, tensor: Tensor, gradient: Tensor) -> Tensor:
        return depend_on(tensor, gradient)


class MaterialisedLayer(AdaptedLayer):
    """A layer of small parameters: every group has its own, [G, *shape].

    They are fp32 at least: an update rounded into bf16 would be lost.
    """

    def __init__(self, module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> None:
        self.names = sorted(inner, key=lambda name: not inner[name])  # the moving ones first
        moving = sum(inner.values())
        parameters = [getattr(module, name) for name in self.names]
        own = [_per_group(parameter, state.groups) for parameter in parameters[:moving]]
        super().__init__(state, rate, [*own, *parameters[moving:]], moving)

    def factor_tensors(self) -> list[Tensor]:
        return self.moved

    def change(self, group: int) -> LayerChange:
        own = {name: tensor[group] for name, tensor in zip(self.names, self.moved, strict=False)}
        return LayerChange(small=own)

    def of_rows(self, name: str) -> Tensor | None:
        """Each row's parameter at the current level, [B, *shape]; None if the layer has none."""
        if name not in self.names:
            return None
        index, rows = self.names.index(name), self.state.rows
        tensor = self.tensors[index]
        if index < self.moving and rows.in_order:  # no gather, whose backward would sort
            shape = rows.groups, rows.per_group, *tensor.shape[1:]
            return tensor[:, None].expand(shape).flatten(0, 1)
        if index < self.moving:
            return tensor[rows.group_B]
        return tensor.expand(len(rows), *tensor.shape)


def _per_group(parameter: Tensor, groups: int) -> Tensor:
    """[G, *shape], with a graph to the parameter if it is trained."""
    wide = parameter if parameter.dtype == torch.float64 else parameter.float()
    expanded = wide.expand(groups, *parameter.shape)
    return expanded if parameter.requires_grad else expanded.detach().requires_grad_()


Rule = Callable[[Any, dict[str, bool], StepState, Rate], AdaptedLayer]
_RULES: dict[str, Rule] = {}


def rule_for(*types: str) -> Callable[[Rule], Rule]:
    """Registers a rule for layers of these types, named ``module.Class`` so that none has to be
    imported.

    A rule takes the module, for each of its own parameters whether the inner step moves it, the
    state, and the rate of the layer.
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
