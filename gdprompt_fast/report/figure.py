"""The figure of a run: the three settings before and after, and the training curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation import SETTINGS
from ..evaluation.held_out import held_out_curves
from .table import Summaries

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#b0b7c3", "#2f6db3", "#d9822b")
SMOOTHED_STEPS = 20


def draw_figure(
    evaluations: Mapping[str, Summaries], metrics: Sequence[Mapping[str, float]], path: Path
) -> None:
    """Draws accuracy, NLL, the training curve and, where there is one, the held-out curve side by
    side, in the format of the suffix.

    Args:
        evaluations: the summaries by setting, by the name in the legend; empty for the curve alone.
        metrics: the rows of a metrics file.
    """
    from matplotlib.figure import Figure  # half a second, which most commands do without

    held_out = held_out_curves(metrics)
    panels = (3 if evaluations else 1) + bool(held_out)
    figure = Figure(figsize=(4.2 * panels, 3.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if evaluations:
        _bars(axes[0], evaluations, "accuracy", "accuracy")
        axes[0].set_ylim(0, 1.05)
        _bars(axes[1], evaluations, "nll_per_token", "NLL per token")
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=len(names), frameon=False)
    _curve(axes[2 if evaluations else 0], metrics)
    if held_out:
        _held_out(axes[-1], held_out)
    figure.savefig(path, dpi=150)


def _bars(axes: Axes, evaluations: Mapping[str, Summaries], field: str, label: str) -> None:
    width = 0.8 / len(evaluations)
    for index, (name, summaries) in enumerate(evaluations.items()):
        offset = (index - (len(evaluations) - 1) / 2) * width
        axes.bar(
            [position + offset for position in range(len(SETTINGS))],
            _values(summaries, field),
            width,
            yerr=_values(summaries, f"{field}_se"),
            color=COLOURS[index % len(COLOURS)],
            capsize=3,
            label=name,
        )
    axes.set_xticks(range(len(SETTINGS)), SETTINGS.values())
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _values(summaries: Summaries, field: str) -> list[float]:
    """A field by setting; NaN, which is not drawn, where it is not known."""
    values = [getattr(summaries[setting], field) for setting in SETTINGS]
    return [math.nan if value is None else value for value in values]


def _curve(axes: Axes, metrics: Sequence[Mapping[str, float]]) -> None:
    """The outer loss of every step, and its mean over the last few."""
    steps = [row["step"] for row in metrics]
    losses = [row["query_loss"] for row in metrics]
    recent = [losses[max(0, end - SMOOTHED_STEPS) : end] for end in range(1, len(losses) + 1)]
    means = [sum(window) / len(window) for window in recent]
    axes.plot(steps, losses, color=COLOURS[0], linewidth=0.7)
    axes.plot(steps, means, color=COLOURS[1], label=f"mean of {SMOOTHED_STEPS} steps")
    axes.set_xlabel("outer step")
    axes.set_ylabel("outer loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _held_out(axes: Axes, curves: Mapping[str, Mapping[int, float]]) -> None:
    """The held-out NLL in the three settings, and where Fine-Tuning's was lowest."""
    for (setting, curve), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(list(curve), list(curve.values()), color=colour, label=SETTINGS[setting])
    after = curves.get("fine_tuning", {})
    if after:
        best = min(after, key=lambda step: after[step])
        axes.axvline(best, color="#7a6a58", linewidth=0.7, linestyle=":", label="best/")
    axes.set_xlabel("outer step")
    axes.set_ylabel("held-out NLL per token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
