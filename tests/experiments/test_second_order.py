"""The study of second order: what is compared along a training, which watching leaves as it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gdprompt_fast.experiments import second_order_stages
from gdprompt_fast.experiments.run import run_experiment
from gdprompt_fast.experiments.second_order_stages import EXACT, FIRST_ORDER, WAYS, Options
from gdprompt_fast.training.metrics import METRICS_FILE, read_metrics
from gdprompt_fast.training.options import TrainOptions
from helpers.experiments import content, contexts_of

STAGES = "stages/seed-0/second-order/squad"
OPTIONS = Options(task="squad", objective="kl", inner_lrs=(0.1, 0.5), steps=2, points=1, probes=1)


def curve(folder: Path, way: second_order_stages.Way, rate: float) -> list[dict[str, Any]]:
    (ctx,) = contexts_of(content(folder, "second-order")["settings"], folder)
    stage = second_order_stages.training_stage(ctx, OPTIONS, way, rate)
    found: list[dict[str, Any]] = stage.result["curve"]
    return found


def test_every_way_begins_at_the_same_model_and_gradients_are_compared_along_the_exact_one(
    done: Path,
) -> None:
    for rate in OPTIONS.inner_lrs:
        curves = {way: curve(done, way, rate) for way in WAYS}
        assert {way for way, points in curves.items() if points[0]["gradients"]} == {EXACT}
        assert len({points[0]["nll"] for points in curves.values()}) == 1
        assert curves[EXACT][-1]["nll"] != curves[FIRST_ORDER][-1]["nll"]
        assert [point["step"] for point in curves[EXACT]] == [0, 2]
        assert all(len(point["correct"]) == 8 for points in curves.values() for point in points)
    cosines = [curve(done, EXACT, rate)[0]["gradients"][0] for rate in OPTIONS.inner_lrs]
    assert 1 > cosines[0]["first_order"] > cosines[1]["first_order"]
    assert all(0.9 < each["bf16"] < 1 for each in cosines)


def test_the_study_has_a_table_charts_and_findings_for_every_rate(done: Path) -> None:
    found = content(done, "second-order")
    (table,) = found["tables"]
    assert table["columns"] == ["η = 0.1", "η = 0.5"]
    assert [row["head"] for row in table["rows"]] == [
        "before",
        *(way.head for way in WAYS),
        "exact, in the time of first-order",
    ]
    assert [len(chart["lines"]) for chart in found["charts"]] == [5, 2, 2]
    assert len(found["findings"]) == 6 and "cpu" in found["device"]


def test_watching_a_training_leaves_it_as_it_is(
    done: Path, sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "unwatched"
    shutil.copytree(done, output)
    folder = output / STAGES / "exact-rate-0.5"
    watched = read_metrics(folder / METRICS_FILE)
    shutil.rmtree(folder)
    meta_train = second_order_stages.meta_train

    def unwatched(*args: Any, watch: Any, **kwargs: Any) -> None:
        meta_train(*args, **kwargs)

    monkeypatch.setattr(second_order_stages, "meta_train", unwatched)
    with pytest.raises(KeyError):  # nothing was measured
        run_experiment("second-order", contexts_of(sections, output))
    assert read_metrics(folder / METRICS_FILE) == watched


def test_first_order_is_an_option_of_training() -> None:
    options = TrainOptions(first_order=True)
    assert options.step_config.first_order
    assert not replace(options, first_order=False).step_config.first_order
