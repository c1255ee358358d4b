"""What second order buys: first-order and exact meta-training over inner rates, side by side.

Every way begins at the same base model and trains on the same examples in the same order. Measured
are the meta-gradient along the exact training, of which first-order MAML and bf16 are held against
the exact one, and Fine-Tuning on unseen examples at the rate of training, after as many steps and,
by stopping the exact training early, after as much time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..report.cells import Cell, Estimate
from ..report.findings import Finding, Named, close, larger
from ..report.outcome import Chart, Outcome, Table, Texts
from .context import ExperimentContext
from .preset import Preset
from .second_order_stages import (
    BF16,
    EXACT,
    FIRST_ORDER,
    WAYS,
    Options,
    Way,
    time_stage,
    training_stage,
)
from .variants import Variant

TITLE = "What second order buys"
BEFORE = "before"
STOPPED = "exact, in the time of first-order"
GRADIENTS = {
    "first_order": "cosine of the first-order meta-gradient with the exact one",
    "bf16": "cosine of the meta-gradient in bf16 with that in fp32",
}

Curve = list[dict[str, Any]]

__all__ = ["Options", "run", "variants"]


@dataclass(frozen=True)
class _Measured:
    """The curves of every seed, by way and inner rate, and the seconds of a step, by way."""

    curves: dict[tuple[Way, float], list[Curve]]
    seconds: dict[str, float]
    device: str

    def cell(self, way: Way, inner_lr: float, point: int = -1) -> Cell:
        """Whether answers were right, at a point of the training."""
        of_seeds = [curve[point]["correct"] for curve in self.curves[way, inner_lr]]
        return Cell(tuple(tuple(map(float, correct)) for correct in of_seeds))

    def nll(self, way: Way, inner_lr: float) -> float:
        """Of the gold responses at the end, the mean over seeds; NaN where one diverged."""
        ends = [curve[-1]["nll"] for curve in self.curves[way, inner_lr]]
        return math.nan if None in ends else fmean(ends)

    @property
    def share(self) -> float:
        """Of the time of an exact step, what a first-order one takes."""
        return self.seconds[FIRST_ORDER.name] / self.seconds[EXACT.name]

    @property
    def steps(self) -> list[int]:
        """Of the points of every training."""
        curves = next(iter(self.curves.values()))
        return [point["step"] for point in curves[0]]

    @property
    def stopped(self) -> int:
        """The last point of the exact training within the time of the first-order one."""
        share = min(1.0, self.share)
        return max(i for i, step in enumerate(self.steps) if step <= share * self.steps[-1])

    def cosine(self, inner_lr: float, point: int, of: str) -> Estimate:
        """The mean over probes and seeds of a gradient's cosine with the exact one."""
        of_seeds = [curve[point]["gradients"] for curve in self.curves[EXACT, inner_lr]]
        return Cell(tuple(tuple(each[of] for each in probes) for probes in of_seeds)).estimate


def run(repetitions: Sequence[ExperimentContext], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    curves = {
        (way, rate): [
            training_stage(ctx, options, way, rate).result["curve"] for ctx in repetitions
        ]
        for rate in options.inner_lrs
        for way in WAYS
    }
    measured = _Measured(curves, **time_stage(repetitions[0], options).result)
    task = repetitions[0].preset.tasks[options.task]
    return Outcome(
        TITLE,
        [_table(measured, options, task.label)],
        _findings(measured, options, repetitions[0].preset.findings.margin),
        _notes(measured, options),
        [_likelihoods(measured, options), _cosines(measured, options), _times(measured)],
        [_accuracy_chart(measured, options), *_gradient_charts(measured, options)],
    )


def _table(measured: _Measured, options: Options, label: str) -> Table:
    rows: dict[str, list[Cell | None]] = {
        BEFORE: [measured.cell(EXACT, rate, 0) for rate in options.inner_lrs]
    }
    for way in WAYS:
        rows[way.head] = [measured.cell(way, rate) for rate in options.inner_lrs]
    rows[STOPPED] = [measured.cell(EXACT, rate, measured.stopped) for rate in options.inner_lrs]
    title = f"{label}: accuracy after Fine-Tuning, by the inner rate of training"
    return Table(title, [_at(rate) for rate in options.inner_lrs], rows)


def _findings(measured: _Measured, options: Options, margin: float) -> list[Finding]:
    found = []
    for rate in options.inner_lrs:
        named = {way: Named(way.head, measured.cell(way, rate)) for way in WAYS}
        exact, first, where = named[EXACT], named[FIRST_ORDER], _at(rate)
        stopped = Named(STOPPED, measured.cell(EXACT, rate, measured.stopped))
        better = "exact gradients do better than first-order ones"
        found += [
            larger(f"{better} in as many steps", where, exact, first),
            larger(f"{better} in as much time", where, stopped, first),
        ]
        claim = "exact gradients in bf16 do as well as in fp32"
        found.append(close(claim, where, named[BF16], exact, margin))
    return found


def variants(preset: Preset, options: Options) -> list[Variant]:
    """None: its trainings are its own, watched on the way."""
    return []


def _notes(measured: _Measured, options: Options) -> list[str]:
    stopped = measured.steps[measured.stopped]
    return [
        f"Every model trains {options.steps} outer steps ({options.objective}) from the same base "
        "model. Fine-Tuning is one inner step at the rate of training; an answer is right if every "
        "token of it is the gold response's.",
        f"A first-order step takes {measured.share:.2f} of the time of an exact one; “{STOPPED}”: "
        f"after {stopped} of the {options.steps} steps, at an outer rate that has not come down.",
        "Cosines are over all parameters, the mean over the first "
        f"{options.probes} batches of training contexts, along the exact training; "
        f"“{BEFORE}” is the base model.",
    ]


def _likelihoods(measured: _Measured, options: Options) -> Texts:
    """The NLL of a gold response after Fine-Tuning, summed over its tokens, by way and rate."""
    rows = [
        [way.head, *(f"{measured.nll(way, rate):.2f}" for rate in options.inner_lrs)]
        for way in WAYS
    ]
    columns = ["", *map(_at, options.inner_lrs)]
    return Texts("NLL of the gold response after Fine-Tuning, in nats", columns, rows)


def _cosines(measured: _Measured, options: Options) -> Texts:
    """A row an inner rate: both cosines before, on the way and at the end."""
    steps = measured.steps
    points = sorted({0, len(steps) // 2, len(steps) - 1})
    names = {"first_order": "first-order", "bf16": "bf16"}
    columns = [f"{name}, step {steps[point]}" for name in names.values() for point in points]
    rows = [
        [
            _at(rate),
            *(_cosine(measured.cosine(rate, point, of)) for of in names for point in points),
        ]
        for rate in options.inner_lrs
    ]
    return Texts("Cosine with the exact meta-gradient", ["", *columns], rows)


def _times(measured: _Measured) -> Texts:
    exact = measured.seconds[EXACT.name]
    rows = [
        [way.head, f"{1e3 * own:.1f} ms", f"{own / exact:.2f}"]
        for way in WAYS
        for own in [measured.seconds[way.name]]
    ]
    columns = ["", "time", "of the exact step"]
    return Texts(
        f"Time of a meta step, the fastest of several, on {measured.device}", columns, rows
    )


def _accuracy_chart(measured: _Measured, options: Options) -> Chart:
    lines = {
        way.head: [(rate, measured.cell(way, rate).estimate) for rate in options.inner_lrs]
        for way in WAYS
    }
    lines[STOPPED] = [
        (rate, measured.cell(EXACT, rate, measured.stopped).estimate) for rate in options.inner_lrs
    ]
    lines[BEFORE] = [(rate, measured.cell(EXACT, rate, 0).estimate) for rate in options.inner_lrs]
    return Chart("Fine-Tuning", "inner rate η", "accuracy", lines, log_x=True)


def _gradient_charts(measured: _Measured, options: Options) -> list[Chart]:
    def points(rate: float, of: str) -> list[tuple[float, Estimate]]:
        curve = measured.curves[EXACT, rate][0]
        return [(at["step"], measured.cosine(rate, i, of)) for i, at in enumerate(curve)]

    return [
        Chart(title, "outer step", "cosine", {_at(r): points(r, of) for r in options.inner_lrs})
        for of, title in GRADIENTS.items()
    ]


def _at(rate: float) -> str:
    return f"η = {rate:g}"


def _cosine(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} ± {estimate.se:.4f}"
