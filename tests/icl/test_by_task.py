"""What tables by task show: on the same examples, and nothing where nothing was clipped."""

from __future__ import annotations

import math

import pytest
import torch

from gdprompt_fast.icl.by_task import COSINE, above, beside_logs
from gdprompt_fast.icl.metrics import Ratio, ratio_cell
from gdprompt_fast.icl.table3 import CAUSAL, L2, MAX, never_clipped
from gdprompt_fast.report.cells import Cell
from gdprompt_fast.report.outcome import Table

WITHOUT = Cell(((0.30, 0.32, 0.28, 0.31), (0.33, 0.29, 0.30, 0.32)))


def table(**rows: Cell) -> Table:
    return Table("SimAOU, at the candidate token", ["Subj"], {n: [c] for n, c in rows.items()})


def shifted(by: float, spread: float) -> Cell:
    """``WITHOUT`` and a difference from it, of ± ``spread`` an example."""
    signs = (1, -1, 1, -1)
    return Cell(
        tuple(
            tuple(x + by + sign * spread for x, sign in zip(values, signs, strict=True))
            for values in WITHOUT.values
        )
    )


@pytest.mark.parametrize(
    ("by", "spread", "kept"),
    [
        (-0.01, 0.005, True),  # se .002: between -.014 and -.006
        (-0.018, 0.005, False),  # reaches below -.02
        (-0.03, 0.005, False),
        (0.05, 0.001, True),
        (-0.001, 0.1, False),  # nothing is known of it
    ],
)
def test_a_number_is_kept_if_the_whole_interval_is_within_the_margin(
    by: float, spread: float, kept: bool
) -> None:
    (finding,) = above("kept", table(a=shifted(by, spread), b=WITHOUT), "a", "b", 0.02)
    (difference,) = finding.differences
    assert math.isclose(difference.value, by) and difference.se > 0
    assert finding.shows is kept is (difference.value - 2 * difference.se > -0.02)


def test_with_a_control_of_fewer_examples_both_are_of_the_first() -> None:
    """Taken as independent, the spread of examples would hide the difference."""
    method = Cell(((0.1, 0.9, 0.5, 7.0), (0.3, 0.7, 0.2, 7.0)))
    control = Cell(((0.0, 0.81, 0.4), (0.21, 0.6, 0.1)))
    (finding,) = above("above", table(a=method, b=control), "a", "b")
    (difference,) = finding.differences
    assert math.isclose(difference.value, (0.1 + 0.09 + 0.1 + 0.09 + 0.1 + 0.1) / 6)
    assert finding.shows and "of the first 3 of each seed." in finding.because


def test_a_ratio_of_the_first_examples_is_of_their_counts() -> None:
    part, whole = torch.tensor([1, 0, 1, 1, 1]), torch.tensor([1, 1, 1, 1, 1])
    every = ratio_cell([Ratio(part, whole), Ratio(part.flip(0), whole)])
    assert math.isclose(every.mean, 4 / 5)
    assert math.isclose(every.first([2, 2]).mean, 3 / 4)
    (finding,) = above("a", table(a=every, b=Cell(((0.0, 0.0), (0.5, 0.5)))), "a", "b")
    assert math.isclose(finding.differences[0].value, 3 / 4 - 1 / 4)


def test_a_clip_that_never_acts_is_told_from_one_that_does() -> None:
    undefined = Cell(((math.nan, 1.0), (2.0, 3.0)))
    one = table(**{CAUSAL: WITHOUT, L2: shifted(1e-12, 0), MAX: WITHOUT})
    other = table(**{CAUSAL: undefined, L2: undefined, MAX: undefined})
    tables = {"candidate token": {"SimAOU": one, "SimAM": other}}
    assert never_clipped(tables, MAX) == ["Subj"]
    assert never_clipped(tables, L2) == []


def test_what_the_code_logged_stands_beside_ours() -> None:
    tables = {"SimAOU": Table("SimAOU, here", ["Subj"], {"FT": [WITHOUT]}, unit=COSINE)}
    (texts,) = beside_logs(tables, {"SimAOU": {"FT": {"subj": 0.254, "cb": 0.1}}})
    assert texts.rows == [("SimAOU, here: FT", "Subj", "0.254", "0.306 ± 0.00625")]
    assert beside_logs(tables, {"SimAOU": {"FT": {"cb": 0.1}}}) == []
