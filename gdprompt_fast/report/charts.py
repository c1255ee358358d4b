"""Charts of lines with error bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .experiment import COLOURS, spread


def draw_charts(charts: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a chart: a line for each of its names, with error bars."""
    from matplotlib.figure import Figure  # half a second, which most commands do without

    figure = Figure(figsize=(5.0 * len(charts), 4.0), layout="constrained")
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        for index, line in enumerate(chart["lines"]):
            axes.errorbar(
                [point["x"] for point in line["points"]],
                [point["value"] for point in line["points"]],
                [spread(point) for point in line["points"]],
                color=COLOURS[index % len(COLOURS)],
                marker="o",
                markersize=3,
                capsize=2,
                label=line["head"],
            )
        axes.set_xscale("log" if chart["log_x"] else "linear")
        axes.set_xlabel(chart["x"])
        axes.set_ylabel(chart["y"])
        axes.set_title(chart["title"], fontsize="medium", wrap=True)
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, format="png")
