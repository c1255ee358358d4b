"""The three settings as a Markdown table that reads well in a terminal too."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..artifacts.markdown import markdown_table
from ..evaluation import SETTINGS, Summary

Summaries = Mapping[str, Summary]

ABSENT = "–"
# What the rows show: shares in per cent, but for the NLL.
METRICS = {
    "accuracy": "accuracy",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "f1": "F1",
    "nll_per_token": "NLL per token",
}


def results_table(evaluations: Mapping[str, Summaries]) -> str:
    """A Markdown table of the metrics, ± one standard error; generated answers' where there are
    some.

    Args:
        evaluations: the summaries by setting, under the name that their rows shall have
            ("before", "after"; or "" for a single evaluation).
    """
    rows = [["", *SETTINGS.values()]]
    for field, metric in METRICS.items():
        for name, summaries in evaluations.items():
            cells = [metric_cell(summaries[setting], field) for setting in SETTINGS]
            if any(cell != ABSENT for cell in cells):
                rows.append([f"{metric} {name}".rstrip(), *cells])
    return markdown_table(rows)


def not_improved(before: Summaries, after: Summaries) -> list[str]:
    """A sentence for every setting not better, by two standard errors, in accuracy and NLL."""
    sentences = []
    for setting, name in SETTINGS.items():
        old, new = before[setting], after[setting]
        failed = []
        if not _improved(old, new, "accuracy", sign=1):
            failed.append(f"accuracy ({old.accuracy:.1%} before, {new.accuracy:.1%} after)")
        if not _improved(old, new, "nll_per_token", sign=-1):
            old_nll, new_nll = _number(old.nll_per_token, 2), _number(new.nll_per_token, 2)
            failed.append(f"NLL ({old_nll} before, {new_nll} after)")
        if failed:
            sentences.append(f"{name} did not improve in {' and '.join(failed)}.")
    return sentences


def _improved(old: Summary, new: Summary, field: str, sign: int) -> bool:
    """Whether ``field`` rose (sign 1) or fell (−1) by more than two standard errors of the
    difference, as if the two were independent; no where one of the numbers is not known.
    """
    values = [getattr(of, name) for of in (old, new) for name in (field, f"{field}_se")]
    if None in values:
        return False
    before, before_se, after, after_se = values
    return bool(sign * (after - before) > 2 * math.hypot(before_se, after_se))


def metric_cell(summary: Summary, field: str) -> str:
    """A metric of ``METRICS``, ± one standard error."""
    value, error = getattr(summary, field), getattr(summary, f"{field}_se")
    if value is None:
        return ABSENT
    if field == "nll_per_token":
        return f"{_number(value, 3)} ± {_number(error, 3)}"
    return f"{_number(value, 1, 100)} ± {_number(error, 1, 100)} %"


def _number(value: float | None, digits: int, scale: float = 1) -> str:
    return ABSENT if value is None else f"{scale * value:.{digits}f}"
