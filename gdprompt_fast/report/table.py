"""The three settings as a Markdown table that reads well in a terminal too."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..evaluation import SETTINGS, Summary

Summaries = Mapping[str, Summary]


def results_table(evaluations: Mapping[str, Summaries]) -> str:
    """A Markdown table of accuracy and NLL per token, ± one standard error.

    Args:
        evaluations: the summaries by setting, under the name that their rows shall have
            ("before", "after"; or "" for a single evaluation).
    """
    rows = [["", *SETTINGS.values()]]
    for name, summaries in evaluations.items():
        row = [_percent(summaries[setting]) for setting in SETTINGS]
        rows.append([f"accuracy {name}".rstrip(), *row])
    for name, summaries in evaluations.items():
        row = [_nll(summaries[setting]) for setting in SETTINGS]
        rows.append([f"NLL per token {name}".rstrip(), *row])
    return markdown_table(rows)


def not_improved(before: Summaries, after: Summaries) -> list[str]:
    """A sentence for every setting not better, by two standard errors, in accuracy and NLL."""
    sentences = []
    for setting, name in SETTINGS.items():
        old, new = before[setting], after[setting]
        failed = []
        if not new.accuracy - old.accuracy > 2 * _of_both(old.accuracy_se, new.accuracy_se):
            failed.append(f"accuracy ({old.accuracy:.1%} before, {new.accuracy:.1%} after)")
        drop = old.nll_per_token - new.nll_per_token
        if not drop > 2 * _of_both(old.nll_per_token_se, new.nll_per_token_se):
            failed.append(f"NLL ({old.nll_per_token:.2f} before, {new.nll_per_token:.2f} after)")
        if failed:
            sentences.append(f"{name} did not improve in {' and '.join(failed)}.")
    return sentences


def _of_both(old_se: float, new_se: float) -> float:
    """The standard error of a difference, as if the two were independent."""
    return math.hypot(old_se, new_se)


def _percent(summary: Summary) -> str:
    return f"{100 * summary.accuracy:.1f} ± {100 * summary.accuracy_se:.1f} %"


def _nll(summary: Summary) -> str:
    return f"{summary.nll_per_token:.3f} ± {summary.nll_per_token_se:.3f}"


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table that reads well in a terminal; its first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
