"""The figure of a run: the three settings before and after, and the training curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation import SETTINGS
from .table import Summaries

COLOURS = ("#b0b7c3", "#2f6db3", "#d9822b")
SMOOTHED_STEPS = 20


def draw_figure(
    evaluations: Mapping[str, Summaries], metrics: Sequence[Mapping[str, float]], path: Path
) -> None:
    """Draws accuracy, NLL and the training curve side by side, in the format of the suffix.

    Args:
        evaluations: the summaries by setting, by the name in the legend; empty for the curve alone.
        metrics: the rows of a metrics file.
    """
    panels = 3 if evaluations else 1
    figure = Figure(figsize=(4.2 * panels, 3.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if evaluations:
        _bars(axes[0], evaluations, "accuracy", "accuracy")
        axes[0].set_ylim(0, 1.05)
        _bars(axes[1], evaluations, "nll_per_token", "NLL per token")
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=len(names), frameon=False)
    _curve(axes[-1], metrics)
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
