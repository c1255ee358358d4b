"""What experiments measure and find: contexts, rates, classes, errors, differences."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from gdprompt_fast.experiments import (
    measure,
)
from gdprompt_fast.experiments.context import ExperimentContext
from gdprompt_fast.experiments.measure import EvalSpec
from gdprompt_fast.experiments.table4 import classify
from gdprompt_fast.experiments.table5 import mean_of_draws
from gdprompt_fast.experiments.variants import Variant
from gdprompt_fast.report.cells import Cell, Estimate
from gdprompt_fast.report.findings import (
    Named,
    close,
    destroyed,
    forgets_little,
    kept,
    larger,
)
from helpers.experiments import contexts_of


def test_irrelevant_contexts_come_with_the_same_queries(
    done: Path, sections: dict[str, Any]
) -> None:
    (ctx,) = contexts_of(sections, done)
    right = measure.predictions(ctx, EvalSpec(Variant("wikitext", "gold")))
    wrong = measure.predictions(ctx, EvalSpec(Variant("wikitext", "gold"), irrelevant=1))
    assert [row["query"] for row in right] == [row["query"] for row in wrong]
    assert [row["answers"] for row in right] == [row["answers"] for row in wrong]
    assert all(a["context"] != b["context"] for a, b in zip(right, wrong, strict=True))
    assert {row["context"] for row in right} == {row["context"] for row in wrong}


def test_the_best_inner_rate_is_that_of_the_best_metric_then_of_the_lowest_nll(
    done: Path, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (ctx,) = contexts_of(sections, done, evaluate__inner_lr_grid=[0.1, 0.2, 0.3, 0.4])
    scores = {0.1: (0.5, 1.0), 0.2: (0.5, 0.9), 0.3: (0.9, None), 0.4: (0.4, 0.1), 0.5: (0.0, 0.0)}

    def fake(ctx: ExperimentContext, spec: EvalSpec) -> list[dict[str, Any]]:
        assert spec.count == 4 and spec.inner_lr is not None
        score, nll = scores[spec.inner_lr]
        return [{"settings": {"fine_tuning": {"exact_match": score, "nll": nll}}}] * 2

    monkeypatch.setattr(measure, "predictions", fake)
    assert measure.best_inner_lr(ctx, EvalSpec(Variant("squad"))) == 0.2
    scores[0.5] = (0.6, 5.0)  # the rate of training is tried too
    assert measure.best_inner_lr(ctx, EvalSpec(Variant("squad"))) == 0.5


def prediction(**exact_matches: float) -> dict[str, Any]:
    return {"settings": {name: {"exact_match": value} for name, value in exact_matches.items()}}


def test_the_classes_of_table_4() -> None:
    before = [prediction(no_context=value) for value in (0.0, 1.0, 1.0, 0.0)]
    after = [prediction(fine_tuning=value) for value in (0.0, 1.0, 0.0, 1.0)]
    assert classify(before, after) == [
        "always incorrect",
        "always correct",
        "correct without context",
        "only with context",
    ]
    with pytest.raises(ValueError):
        classify(before, after[:3])


def test_the_standard_errors_of_a_cell() -> None:
    values = (0.0, 1.0, 1.0, 0.5)
    assert Cell((values,)).se == pytest.approx(stdev(values) / 2)
    pairs = Cell((values,), group=2)
    assert (pairs.mean, pairs.se) == (0.625, pytest.approx(stdev((0.5, 0.75)) / math.sqrt(2)))
    # Two seeds far apart: what they say is more than what the examples say.
    far = Cell(((0.0, 0.1), (0.9, 1.0)))
    assert far.se == pytest.approx(stdev((0.05, 0.95)) / math.sqrt(2))
    # Two seeds that agree by chance: the examples' own spread stays.
    near = Cell(((0.0, 1.0), (1.0, 0.0)))
    assert near.se == pytest.approx(math.hypot(0.5, 0.5) / 2)
    assert math.isnan(Cell(((1.0,),)).se)


def test_differences_are_taken_example_by_example_where_there_are_the_same_examples() -> None:
    low = Cell(((0.0, 1.0, 0.0, 1.0),))
    high = Cell(((0.1, 1.1, 0.1, 1.1),))
    assert high.minus(low) == Estimate(pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))
    independent = high.minus_independent(low)
    assert independent.se == pytest.approx(math.hypot(high.se, low.se))
    assert high.minus(Cell(((0.0, 1.0),))).se > 0.4
    assert mean_of_draws([low, high]).values == ((0.05, 1.05, 0.05, 1.05),)


def shares(*counts: int) -> list[Cell]:
    """Cells of 100 examples of which so many are right, each the first ones."""
    return [Cell((tuple(float(i < count) for i in range(100)),)) for count in counts]


def test_findings_show_and_do_not_show() -> None:
    none, few, some, many = (
        Named(str(count), cell)
        for count, cell in zip((0, 3, 30, 90), shares(0, 3, 30, 90), strict=True)
    )
    up = larger("after is better", "a task", many, some)
    assert up.shows and up.verdict == "shows"
    assert "90 90.0 ± 3.0 %, 30 30.0 ± 4.6 %; difference +60.0 ± 4.9 points" in up.because
    assert not larger("after is better", "a task", some, many).shows
    assert not larger("after is better", "a task", few, none).shows  # 3 ± 1.7
    assert larger("harder", "a model", many, some, independent=True).differences[0].se > 0.054

    assert close("as good", "a task", few, none, margin=0.1).shows
    assert not close("as good", "a task", few, none, margin=0.05).shows  # 3 ± 3.4
    assert not close("as good", "a task", many, some, margin=0.1).shows
    single = Named("single", Cell(((1.0,),)))
    assert not close("as good", "a task", single, single, margin=0.1).shows

    claim = "an irrelevant context destroys the gain"
    assert destroyed(claim, "a task", right=many, wrong=few, without=some).shows
    assert destroyed(claim, "a task", right=many, wrong=some, without=some).shows
    assert not destroyed(claim, "a task", right=many, wrong=some, without=none).shows
    assert not destroyed(claim, "a task", right=few, wrong=none, without=none).shows


def test_what_is_kept_and_what_is_forgotten_count_their_errors() -> None:
    none, few, some, many = (
        Named(str(count), cell)
        for count, cell in zip((0, 3, 30, 90), shares(0, 3, 30, 90), strict=True)
    )
    claim = "the use of a prompt is kept"
    assert kept(claim, "a task", many, some, margin=0.05).shows  # more than before
    assert kept(claim, "a task", few, few, margin=0.05).shows
    assert not kept(claim, "a task", some, many, margin=0.05).shows
    assert not kept(claim, "a task", none, few, margin=0.05).shows  # 3 ± 1.7 lost
    single = Named("single", Cell(((1.0,),)))
    assert not kept(claim, "a task", single, single, margin=0.05).shows

    def texts(*values: float) -> Named:
        return Named("texts", Cell((values,)))

    before = texts(3.0, 3.4, 2.6)
    assert forgets_little("LC", texts(3.05, 3.44, 2.64), before, margin=0.1).shows
    assert forgets_little("LC", texts(2.0, 2.0, 2.0), before, margin=0.1).shows
    assert not forgets_little("LC", texts(3.2, 3.6, 2.8), before, margin=0.1).shows
    assert not forgets_little("LC", texts(3.0, 3.4, 2.8), before, margin=0.1).shows  # ± 0.07
    because = forgets_little("LC", texts(3.2, 3.6, 2.8), before, margin=0.1).because
    assert "texts: 3.200 ± 0.231, texts: 3.000 ± 0.231; rise +0.200 ± 0.000" in because
