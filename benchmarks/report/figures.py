"""Draws the sweeps of results/compare.jsonl: time and peak memory, a line per way, log axes.

python -m benchmarks.report.figures                  # the newest rows of every sweep and device
python -m benchmarks.report.figures --run ID         # those of one run
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..harness.rows import RESULTS, Row, rows_of
from ..step.baselines import WAYS

COMPARED = RESULTS / "compare.jsonl"


class Axis(NamedTuple):
    column: str
    label: str


AXES = {
    "examples": Axis("examples", "examples"),
    "context": Axis("context_tokens", "context tokens"),
    "size": Axis("parameters", "parameters"),
    "rank": Axis("rank", "LoRA rank, full-rank inner step"),
    "rank-lora": Axis("rank", "LoRA rank, inner step on the adapters"),
}
COLOURS = dict(zip(WAYS, [f"C{index}" for index in (7, 3, 6, 1, 0, 9, 2, 4, 5)], strict=True))


def file_name(sweep: str, device: str) -> str:
    return f"{device}-{sweep.replace(', ', '-').replace(' ', '-').lower()}.png"


def draw(rows: Sequence[Row], sweep: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_of(rows, sweep).savefig(path, dpi=110)
    return path


def figure_of(rows: Sequence[Row], sweep: str) -> Figure:
    """Where rows measure the same, the last one counts."""
    rows = [row for row in rows if row["kind"] == "time" and row["sweep"] == sweep]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    time, memory = figure.subplots(1, 2)
    _lines(time, rows, sweep, "median_ms", 1e-3, "seconds per step")
    _lines(memory, rows, sweep, "peak_bytes", 1e-6, "peak MB over model and gradients")
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(_title(rows), fontsize=9)
    return figure


def _lines(axes: Axes, rows: list[Row], sweep: str, column: str, scale: float, label: str) -> None:
    """Crosses at the top stand where a way ran out of memory."""
    across = AXES[sweep].column
    for index, way in enumerate(WAYS):
        own = {row[across]: row for row in rows if row["provider"] == way}
        measured = sorted(x for x, row in own.items() if row["status"] == "measured")
        values = [scale * own[x][column] for x in measured]
        width = 2.4 if way == "fast" else 1.2
        colour = COLOURS[way]
        axes.plot(measured, values, "o-", ms=3, lw=width, color=colour, label=way)
        if column == "median_ms":
            low, high = ([scale * own[x][q] for x in measured] for q in ("p20_ms", "p80_ms"))
            axes.fill_between(measured, low, high, color=colour, alpha=0.15, lw=0)
        for x in (x for x, row in own.items() if row["status"] == "out of memory"):
            at = axes.get_xaxis_transform()
            cross = axes.plot(x, 0.98 - 0.04 * index, "x", color=colour, transform=at)
            cross[0].set_in_layout(False)
    axes.set(xscale="log", yscale="log", xlabel=AXES[sweep].label, ylabel=label)
    ticks = sorted({row[across] for row in rows})
    axes.set_xticks(ticks, [f"{x / 1e6:.3g} M" if x >= 1e5 else str(x) for x in ticks])
    axes.set_xticks([], minor=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, which="both", lw=0.4)


def _title(rows: list[Row]) -> str:
    """What all points share."""
    last = rows[-1]
    names = dict(examples="examples", context_tokens="context tokens", query_tokens="query tokens")
    names |= dict(layers="layers", hidden="hidden", vocabulary="vocabulary")
    shared = [c for c in names if len({row[c] for row in rows}) == 1]
    shapes = [f"{last[column]} {names[column]}" for column in shared]
    device = f"{last['device']}, {last['threads']} threads, {last['dtype']}"
    crosses = "crosses: out of memory"
    return f"{', '.join(shapes)}; {device}; {crosses}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=COMPARED)
    parser.add_argument("--run")
    arguments = parser.parse_args()
    rows = [row for row in rows_of(arguments.results, arguments.run) if row["kind"] == "time"]
    for device in ("cpu", "cuda"):
        of_device = [row for row in rows if row["device"].startswith("CPU") == (device == "cpu")]
        for sweep in AXES:
            if any(row["sweep"] == sweep for row in of_device):
                folder = arguments.results.parent / "figures"
                print(draw(of_device, sweep, folder / file_name(sweep, device)))


if __name__ == "__main__":
    main()
