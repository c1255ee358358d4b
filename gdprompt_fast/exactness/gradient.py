"""The gradient: directional derivatives of the true objective against ⟨meta-gradient, v⟩."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .differences import central_difference, rounding_noise
from .objective import Objective
from .report import Finding
from .weights import Vector, combined, dot, moved, norm, random_like, scaled

RANDOM = 2  # directions
MARGIN = 5  # times the uncertainty are allowed: the noise is estimated from a few values
CURVATURE_STEP = 1e-3  # the displacement for H u, over the norm of the weights
NOISE_STEP = 1e-5
LARGEST_STEP = 0.03
LARGEST_CHANGE = 0.1  # of the objective along its gradient, over itself


@dataclass(frozen=True)
class EngineGradients:
    """What the engine gives, with and without its second-order term."""

    whole: Vector
    first_order: Vector

    @property
    def second_order(self) -> Vector:
        return combined(self.whole, self.first_order, -1)


@dataclass(frozen=True)
class OwnTerms:
    """By first derivatives of the model's own forward alone.

    Attributes:
        first_order: the first-order meta-gradient, Σ ∂outer/∂θ' + λ ∇L_LM.
        curvature: −Σ H ∂outer/∂θ' by central differences of ∇L at θ: for one inner step the
            second-order term over η, for more its larger part. Only a direction hangs on it.
    """

    first_order: Vector
    curvature: Vector


def own_terms(model: nn.Module, objective: Objective) -> OwnTerms:
    """See :class:`OwnTerms`."""
    first = objective.lm_gradient()
    curvature: Vector = {}
    weights = norm({name: p.data for name, p in objective.inner.items()})
    for group in objective.groups_with_queries:
        outer = objective.outer_gradient(group)
        first = combined(first, {n: g for n, g in outer.items() if n in objective.trained}, 1)
        direction = {name: g for name, g in outer.items() if name in objective.inner}
        length = norm(direction)
        if not length > 0:
            continue
        step = CURVATURE_STEP * (weights or 1) / length
        for signed in (step, -step):
            with moved(model, direction, signed):
                at = objective.inner_gradient(group, objective.trained)
            curvature = combined(curvature, at, -1 / (2 * signed))
    return OwnTerms(first, curvature)


def first_order_finding(engine: Vector, own: Vector, rtol: float) -> Finding:
    """Every parameter's first-order gradient, the one farthest off: ‖engine − own‖ over its norm,
    or over a thousandth of the whole gradient's where it is smaller, as that of a key's bias.
    """
    least = 1e-3 * norm(own)
    worst, at = 0.0, "none"
    for name in own.keys() | engine.keys():
        both = [{name: of[name]} if name in of else {} for of in (engine, own)]
        size = max(norm(both[1]), least)
        difference = norm(combined(both[0], both[1], -1))
        error = difference / size if size > 0 else difference
        if not error <= worst:
            worst, at = error, name
    return Finding(f"first-order gradient, farthest off: {at}", None, None, worst, rtol)


class Directions:
    """Directional derivatives of φ at the weights that the model has.

    Args:
        rtol: the relative difference that counts as equal.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, engine: EngineGradients, rtol: float
    ) -> None:
        self.model, self.objective, self.engine, self.rtol = model, objective, engine, rtol
        self.trained = {name: p.data for name, p in objective.trained.items()}
        self.weights = norm(self.trained) or 1.0
        self.value = objective.value()
        noisy = _unit(random_like(self.trained, seed=0))
        at = NOISE_STEP * self.weights
        self.noise = rounding_noise(lambda step: self._value_at(noisy, step), at)

    def _value_at(self, direction: Vector, step: float) -> float:
        with moved(self.model, direction, step):
            return self.objective.value()

    def finding(self, name: str, direction: Vector, sensitive: bool) -> Finding:
        """The derivative along a unit vector: ⟨g, v⟩ and central differences.

        What counts as equal is relative to ⟨g, v⟩, or to its size if its terms had random signs,
        (Σ g² v²)^½, and ``MARGIN`` times the uncertainty more.

        Args:
            sensitive: whether φ changes along it as along its gradient, or slowly, as along a
                random direction of thousands of dimensions.
        """
        predicted = dot(self.engine.whole, direction)
        terms = {
            name: self.engine.whole[name] * v
            for name, v in direction.items()
            if name in self.engine.whole
        }
        scale = max(abs(predicted), norm(terms))
        step = LARGEST_STEP * self.weights
        if sensitive:
            slope = max(norm(self.engine.whole), 1e-12)
            step = min(step, LARGEST_CHANGE * max(abs(self.value), 1e-3) / slope)
        enough = self.rtol * scale / 3
        own = central_difference(
            lambda step: self._value_at(direction, step), step, self.noise, enough
        )
        allowed = self.rtol * scale + MARGIN * own.uncertainty
        difference = abs(predicted - own.value)
        return Finding(name, predicted, own.value, difference, allowed, own.uncertainty)

    def all(self, own: OwnTerms) -> Iterator[tuple[Finding, Vector]]:
        """Every direction's finding, with its unit vector; the meta-gradient's first."""
        missing = {
            name: tensor
            for name, tensor in own.first_order.items()
            if name not in self.engine.whole and bool(tensor.any())
        }
        first = own.first_order
        share = dot(own.curvature, first) / max(dot(first, first), 1e-300)
        across = combined(own.curvature, first, -share)
        directions = {
            "along the meta-gradient": self.engine.whole,
            "along its second-order term": self.engine.second_order,
            ACROSS: across,
            f"along {', '.join(missing)}, without a gradient": missing,
        }
        for name, direction in directions.items():
            if norm(direction) > 0:
                unit = _unit(direction)
                yield self.finding(name, unit, sensitive=True), unit
        for seed in range(1, RANDOM + 1):
            unit = _unit(random_like(self.trained, seed))
            yield self.finding(f"along random direction {seed}", unit, sensitive=False), unit


ACROSS = "along H ∂outer/∂θ', across the first-order one"


def _unit(direction: Vector) -> Vector:
    return scaled(direction, 1 / norm(direction))


@dataclass(frozen=True)
class Power:
    """How well the second-order term can be seen.

    Attributes:
        times_allowed: the largest ⟨second-order term, v⟩ over the difference allowed along v.
        inner_lr: the η at which it would be clear; None where nothing says so.
    """

    times_allowed: float
    inner_lr: float | None


def power_of(
    found: list[tuple[Finding, Vector]], engine: EngineGradients, own: OwnTerms, needed: float
) -> Power:
    """The second-order term against what is allowed; it grows as η does."""
    second = engine.second_order
    times = [abs(dot(second, v)) / f.allowed for f, v in found if f.allowed > 0]
    inner_lr = None
    for finding, direction in found:
        per_rate = abs(dot(own.curvature, direction))
        if finding.name == ACROSS and per_rate > 0:
            inner_lr = _rounded_up(3 * needed * finding.allowed / per_rate)
    return Power(max(times, default=0.0), inner_lr)


def _rounded_up(value: float) -> float:
    """To one digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.ceil(value / unit) * unit:.1g}")


def rounding_of(dtype: torch.dtype) -> float:
    """The relative difference that counts as equal in a dtype."""
    return {torch.float64: 1e-5, torch.float32: 1e-3}.get(dtype, 1e-1)
