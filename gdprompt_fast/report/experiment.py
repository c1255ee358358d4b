"""An experiment's JSON as Markdown and as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ..artifacts.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Content = Mapping[str, Any]

PAPER = "paper"
PERCENT = "%"  # the unit of tables that say none
PANELS_IN_A_ROW = 3
WIDEST_HEAD = 16  # characters in a line under a group of bars
COLOURS = ("#b0b7c3", "#2f6db3", "#d9822b", "#5a9367", "#8c5fa8", "#c04f5d", "#7a6a58")


def experiment_markdown(content: Content, figure: str) -> str:
    """The whole of an experiment; ``figure`` is the file name of its figure."""
    parts = [f"# {content['title']}", f"![{content['title']}]({figure})"]
    for table in content["tables"]:
        if table["title"] != content["title"]:
            parts.append(f"## {table['title']}")
        parts.append(markdown_table(_escaped(table_rows(table))))
    parts.append(how_to_read(content))
    if content["findings"]:
        findings = [f"- **{each['verdict']}**: {sentence(each)}" for each in content["findings"]]
        parts += ["## Findings", "\n".join(findings)]
    parts.append("## Notes")
    parts.append("\n".join(f"- {note}" for note in content["notes"]))
    for texts in content["texts"]:
        rows = [list(texts["columns"]), *map(list, texts["rows"])]
        parts += [f"## {texts['title']}", markdown_table(_escaped(rows))]
    parts.append(circumstances(content))
    return "\n\n".join(parts) + "\n"


def table_rows(table: Content) -> list[list[str]]:
    """A table as texts, its heads first: a column of the paper's numbers follows where it has any.

    A number is in the table's unit, ± its standard error.
    """
    digits = 1 if table.get("unit", PERCENT) == PERCENT else 3
    columns = range(len(table["columns"]))
    in_paper = [any(_paper(row["cells"][column]) for row in table["rows"]) for column in columns]
    rows = [["", *(head for c in columns for head in _heads(table["columns"][c], in_paper[c]))]]
    for row in table["rows"]:
        texts = [row["head"]]
        for cell, has_paper in zip(row["cells"], in_paper, strict=True):
            texts.append(_measured(cell, digits))
            if has_paper:
                texts.append(_paper(cell))
        rows.append(texts)
    return rows


def sentence(finding: Content) -> str:
    """A finding without its verdict."""
    return f"{finding['claim']} ({finding['where']}). {finding['because']}"


def how_to_read(content: Content) -> str:
    """What the numbers of the tables are."""
    seeds = content["seeds"]
    over = "examples" if len(seeds) == 1 else "examples or over seeds, whichever is larger"
    return (
        f"In % where nothing else is said, ± one standard error over {over}. "
        f"Seeds: {', '.join(map(str, seeds))}. "
        f"“{PAPER}”: {content['paper']['source']}; {content['paper']['model']}."
    )


def circumstances(content: Content) -> str:
    """When, where, how long and with what."""
    packages = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return (
        f"Model {content['settings']['model']['name']}; {content['seconds']:.0f} s of work in "
        f"{len(content['stages'])} stages on {content['device']}; {packages}; "
        f"finished {content['finished']}."
    )


def draw_tables(content: Content, path: Path) -> None:
    """A panel a table: a group of bars for every column, the paper's numbers as diamonds."""
    from matplotlib.figure import Figure  # half a second, which most commands do without

    tables, in_paper = content["tables"], f"the paper, {content['paper']['model']}"
    across = min(PANELS_IN_A_ROW, len(tables))
    down = math.ceil(len(tables) / across)
    columns = max(len(table["columns"]) for table in tables)
    figure = Figure(figsize=(max(4.0, 1.3 * columns) * across, 4.0 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    legend: dict[str, Any] = {}
    for ax, table in zip(axes, tables, strict=False):
        _panel(ax, table, in_paper)
        handles, labels = ax.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    if in_paper in legend:
        legend[in_paper] = legend.pop(in_paper)  # to the end
    for ax in axes[len(tables) :]:
        ax.set_axis_off()
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower left",
        ncols=across,
        frameon=False,
        fontsize="small",
    )
    figure.savefig(path, dpi=120, format="png")


def _panel(axes: Axes, table: Content, paper_legend: str) -> None:
    width = 0.8 / len(table["rows"])
    places: list[float] = []
    in_paper: list[float] = []
    for index, row in enumerate(table["rows"]):
        offset = (index - (len(table["rows"]) - 1) / 2) * width
        axes.bar(
            [column + offset for column in range(len(table["columns"]))],
            [_drawn(cell, "mean") for cell in row["cells"]],
            width,
            yerr=[_drawn(cell, "se") for cell in row["cells"]],
            color=COLOURS[index % len(COLOURS)],
            capsize=2,
            label=row["head"],
        )
        for column, cell in enumerate(row["cells"]):
            if cell is not None and cell["paper"] is not None:
                places.append(column + offset)
                in_paper.append(cell["paper"])
    if in_paper:
        axes.plot(places, in_paper, "kD", markersize=4, label=paper_legend)
    heads = [fill(head, WIDEST_HEAD) for head in table["columns"]]
    axes.set_xticks(range(len(heads)), heads, fontsize="small")
    unit = table.get("unit", PERCENT)
    if unit == PERCENT:
        axes.set_ylim(0, 105)
    axes.set_ylabel(unit)
    axes.set_title(table["title"], fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)


def _drawn(cell: Content | None, field: str) -> float:
    """A number of a cell; NaN, which is not drawn, where there is none."""
    return math.nan if cell is None or cell[field] is None else float(cell[field])


def _heads(column: str, has_paper: bool) -> list[str]:
    return [column, PAPER] if has_paper else [column]


def _measured(cell: Content | None, digits: int) -> str:
    if cell is None:
        return ""
    mean, se = ("?" if cell[k] is None else f"{cell[k]:.{digits}f}" for k in ("mean", "se"))
    return f"{mean} ± {se}"


def _paper(cell: Content | None) -> str:
    return "" if cell is None or cell["paper"] is None else f"{cell['paper']:g}"


def _escaped(rows: list[list[str]]) -> list[list[str]]:
    """Cells that cannot break out of a Markdown table."""
    return [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
