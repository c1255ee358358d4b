"""The search for the outer rate: every rate from the same start, none trained twice, the best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gdprompt_fast.training.loop
from gdprompt_fast.cli.main import main
from gdprompt_fast.meta.step import fast_meta_step

STEPS = ["--steps-per-rate", "3", "--warmup-steps", "1", "--batch-size", "2", "--inner-lr", "0.1"]


@pytest.fixture
def command(model_folder: Path, triples: Path) -> list[str]:
    files = ["--model", str(model_folder), "--data", str(triples), "--test-data", str(triples)]
    return ["search-outer-lr", *files, *STEPS, "--objective", "gold", "--device", "cpu"]


def test_the_best_rate_of_the_grid_is_printed_with_all_scores(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "search"
    grid = ["--grid", "1e30", "1e-2", "1e-9"]
    assert main([*command, *grid, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    table = (output / "search.md").read_text()
    assert table in printed and "| 1e+30      | diverged" in table
    assert table.rstrip().endswith("best: --outer-lr 0.01")
    found = json.loads((output / "search.json").read_text())
    assert found["best"] == 0.01
    small, middle, large = found["rates"]
    assert [rate["outer_lr"] for rate in found["rates"]] == [1e-9, 1e-2, 1e30]
    nll = [rate["settings"]["fine_tuning"]["nll_per_token"] for rate in (small, middle)]
    assert nll[1] < nll[0]
    assert "diverged" in large
    kept = {path.name for path in (output / "rate-0.01").iterdir()}
    assert kept - {"tensorboard"} == {"metrics.jsonl", "result.json"}  # a folder if it is installed


def test_the_best_at_an_end_of_the_grid_asks_for_more_rates(
    command: list[str], tmp_path: Path
) -> None:
    output = ["--output", str(tmp_path / "search")]
    assert main([*command, "--grid", "1e-9", "1e-2", *output]) == 0
    assert "try larger rates too" in (tmp_path / "search" / "search.md").read_text()


def test_every_rate_starts_from_the_same_model(
    command: list[str], model_folder: Path, triples: Path, tmp_path: Path
) -> None:
    assert main([*command, "--grid", "1e-3", "1e-2", "--output", str(tmp_path / "search")]) == 0
    alone = ["train", *command[1 : command.index("--test-data")], "--outer-lr", "1e-2"]
    alone += ["--steps", "3", *STEPS[2:], "--objective", "gold", "--device", "cpu"]
    assert main([*alone, "--output", str(tmp_path / "train")]) == 0
    searched = (tmp_path / "search" / "rate-0.01" / "metrics.jsonl").read_bytes()
    assert searched == (tmp_path / "train" / "metrics.jsonl").read_bytes()


def test_a_continued_search_trains_no_finished_rate_again(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    def counted(*args: object, **options: object) -> object:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return fast_meta_step(*args, **options)  # type: ignore[arg-type]

    whole, killed = (["--output", str(tmp_path / name)] for name in ("whole", "killed"))
    grid = ["--grid", "1e-3", "1e-2"]
    assert main([*command, *grid, *whole]) == 0
    monkeypatch.setattr(gdprompt_fast.training.loop, "fast_meta_step", counted)
    assert main([*command, *grid, *killed]) == 130
    assert main([*command, *grid, *killed, "--resume"]) == 0
    assert len(steps) == 5 + 3  # the second rate had no checkpoint yet
    results = [(tmp_path / name / "search.json").read_text() for name in ("whole", "killed")]
    assert results[0] == results[1]
    assert main([*command, *grid, "1e-1", *killed, "--resume"]) == 0
    assert len(steps) == 5 + 3 + 3
    assert len(json.loads((tmp_path / "killed" / "search.json").read_text())["rates"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "1e-3", "0"], "grid: expected numbers > 0, got 0.0"),
        (["--steps-per-rate", "0"], "steps_per_rate: expected an integer >= 1, got 0"),
    ],
)
def test_bad_input_is_an_error(
    arguments: list[str],
    message: str,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*command, *arguments, "--output", str(tmp_path / "search")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "search").exists()


def test_a_search_needs_held_out_data(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = command.index("--test-data")
    without = command[:at] + command[at + 2 :]
    assert main([*without, "--output", str(tmp_path / "search")]) == 2
    assert "test_data: expected held-out triples" in capsys.readouterr().err
