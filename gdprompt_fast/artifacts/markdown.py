"""Tables of Markdown that read well in a terminal."""

from __future__ import annotations


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table that reads well in a terminal; its first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
