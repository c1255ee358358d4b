"""Intervals and tests over seeds."""

from __future__ import annotations

import math

import pytest

from gdprompt_fast.report.experiment import how_to_read, table_rows
from gdprompt_fast.report.outcome import Outcome, Table
from gdprompt_fast.report.over_seeds import (
    NamedSeeds,
    OverSeeds,
    estimate,
    larger_over_seeds,
    none_over_seeds,
    one_sided_p,
    seeds_needed,
    t_cdf,
    t_quantile,
)


def test_student_s_t_is_that_of_tables() -> None:
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216, 30: 2.04227}
    assert {n: t_quantile(0.975, n) for n in table} == pytest.approx(table, rel=1e-5)
    assert t_cdf(0.0, 4) == 0.5 and t_cdf(-2.0, 7) == pytest.approx(1 - t_cdf(2.0, 7))
    assert t_cdf(1.0, 1) == pytest.approx(0.75) and t_cdf(1.0, 2) == pytest.approx(0.788675)


def test_a_seed_is_one_observation_however_many_examples_it_has() -> None:
    cell = OverSeeds(((1.0, 0.0), (1.0, 1.0), (0.0, 0.0)))
    found = cell.estimate
    assert found.value == 0.5 and found.se == pytest.approx(0.5 / math.sqrt(3))
    assert found.half_interval == pytest.approx(4.30265 * 0.5 / math.sqrt(3), rel=1e-5)
    assert math.isnan(OverSeeds(((1.0,),)).estimate.se)


def test_a_difference_shows_by_the_one_sided_test_of_pairs() -> None:
    high, low = (OverSeeds(tuple((v,) for v in of)) for of in ((0.6, 0.7, 0.65), (0.5, 0.6, 0.56)))
    named = NamedSeeds("one", high), NamedSeeds("other", low)
    finding = larger_over_seeds("it is larger", "here", *named)
    assert finding.shows and "3 seeds, one-sided p < 0.001" in finding.because
    assert not larger_over_seeds("it is larger", "here", *reversed(named)).shows
    assert "includes 0" not in finding.because
    alone = (NamedSeeds("one", OverSeeds(((1.0,),))), NamedSeeds("other", OverSeeds(((0.0,),))))
    assert not larger_over_seeds("it is larger", "here", *alone).shows


def seeds(name: str, *values: float) -> NamedSeeds:
    return NamedSeeds(name, OverSeeds(tuple((value,) for value in values)))


def test_what_shows_by_the_one_sided_test_alone_says_that_its_interval_has_zero() -> None:
    zero = seeds("zero", 0.0, 0.0, 0.0, 0.0)
    finding = larger_over_seeds("it is larger", "here", seeds("one", 0.004, 0.01, 0.02, 0.03), zero)
    assert finding.shows and finding.because.endswith("; the 95 % interval includes 0.")


def test_equal_differences_show_nothing() -> None:
    """0.6 − 0.5 and 0.7 − 0.6 differ by rounding alone."""
    assert all(math.isnan(one_sided_p(each)) for each in ([0.1, 0.1], [0.0] * 5, [0.6 - 0.5, 0.1]))
    pair = seeds("one", 0.6, 0.7), seeds("other", 0.5, 0.6)
    finding = larger_over_seeds("it is larger", "here", *pair)
    assert not finding.shows and "p unknown" in finding.because


def test_no_difference_shows_only_where_something_was_learnt() -> None:
    one, other = seeds("one", 0.6, 0.7, 0.65), seeds("other", 0.5, 0.6, 0.56)
    learnt, floor = [(one, other)], (seeds("D5", 0.0, 0.0, 0.0), seeds("D6", 0.0, 0.0, 0.0))
    for margin, shows in ((0.2, True), (0.1, False)):
        assert none_over_seeds("none", "here", one, other, margin, learnt).shows == shows
    alone = seeds("one", 1.0), seeds("other", 0.0)
    assert not none_over_seeds("none", "here", *alone, 2.0, learnt).shows
    for controls in ([], [(other, one)], [floor]):
        finding = none_over_seeds("none", "here", *floor, 0.05, controls)
        assert not finding.shows and finding.because.endswith("nothing was learnt.")
    finding = none_over_seeds("none", "here", *floor, 0.05, [floor, *learnt])
    assert finding.shows and "learnt: one 65.0" in finding.because


def test_the_seeds_needed_fall_with_the_size_of_an_effect() -> None:
    """For an effect of one standard deviation: (1.645 + 1.282)² + 1.645² / 2 is 9.9."""
    differences = [-1 / math.sqrt(2) + 1, 1 / math.sqrt(2) + 1]
    assert seeds_needed(differences) == 10
    assert seeds_needed([10 * each + 90 for each in differences]) == 2
    assert seeds_needed([-1.0, 0.5]) is None and seeds_needed([1.0]) is None


def test_a_table_says_half_of_the_interval_and_how_to_read_it() -> None:
    cell = OverSeeds(((0.5,), (0.7,)))
    outcome = Outcome("t", [Table("t", ["x"], {"row": [cell]})], [], [], over_seeds=True)
    content = {**outcome.to_json(), "seeds": [0, 1]}
    (row,) = content["tables"][0]["rows"]
    half = row["cells"][0]["half_interval"]
    assert half == pytest.approx(100 * (estimate([0.5, 0.7]).half_interval or 0))
    assert table_rows(content["tables"][0])[1] == ["row", f"60.0 ± {half:.1f}"]
    assert "half of the 95 % interval over seeds" in how_to_read(content)
