"""benchmarks/compare.py and report/: every row that is owed is there and is shown."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare
from benchmarks.harness import isolate
from benchmarks.harness import rows as harness_rows
from benchmarks.report import figures, readme
from benchmarks.step import baselines, cases, measuring

WAYS = ("ordinary", "fast", "sequential")


def measured(sweep: str, case: str, way: str, **row: Any) -> dict[str, Any]:
    """A row as a measurement leaves it."""
    known = dict(kind="time", sweep=sweep, case=case, provider=way, status="measured", run="r")
    known |= dict(examples=8, context_tokens=64, query_tokens=16, parameters=63e6, rank=0)
    known |= dict(layers=2, hidden=8, vocabulary=9, device="CPU x", threads=2, dtype="float32")
    known |= dict(
        p20_ms=1.0, median_ms=2.0, p80_ms=3.0, ratio_to_ordinary=2.5, torch="2", repeats=7
    )
    return known | dict(backend="torch", peak_bytes=4e6, process_peak_bytes=5e6) | row


def test_a_tiny_run_leaves_every_row_a_figure_and_nothing_twice(
    full_figures: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results = tmp_path / "compare.jsonl"
    command = ["--tiny", "--case", "tiny", "--sweep", "examples", "--ways", *WAYS]
    command += ["--device", "cpu", "--threads", "1", "--results", str(results), "--run", "r"]
    assert compare.main(command) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in results.read_text().splitlines()]

    fields = harness_rows.EMPTY.keys()
    gates = [row for row in rows if row["kind"] == "gate"]
    timed = [row for row in rows if row["kind"] == "time"]
    assert [row["provider"] for row in gates] == ["fast", "sequential"]
    cases = ("tiny", "examples 1", "examples 3")
    assert [(r["case"], r["provider"]) for r in timed] == [(c, w) for c in cases for w in WAYS]
    for row in gates:
        assert (row.keys(), row["status"]) == (fields, "passed")
        assert 0 < row["error"] <= measuring.ALLOWED_ERROR
    for row in timed:
        assert (row.keys(), row["status"]) == (fields, "measured")
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert 0 < row["peak_bytes"] < row["process_peak_bytes"]
        for column in ("ratio_to_ordinary", "ordinary_ms", "tokens_per_s", "flop_utilisation"):
            assert row[column] > 0
        assert f"| {row['case']} | {row['provider']} |" in printed
    assert 0 < (tmp_path / "figures" / "cpu-examples.png").stat().st_size < 200_000

    results.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert compare.main(command) == 0
    keys = [compare.key(row) for row in map(json.loads, results.read_text().splitlines())]
    assert keys == [compare.key(row) for row in rows]

    command[command.index("--threads") + 1] = "2"
    assert compare.main(command) == 0
    assert len(results.read_text().splitlines()) == 2 * len(rows)


def test_what_ends_a_process_becomes_a_status() -> None:
    context = isolate.start_method("cpu")
    limit = 4_000_000_000

    def status(limit_s: float, memory: int, function: Any, *arguments: Any) -> str:
        with isolate.Worker(context, memory) as worker:
            return worker.run(limit_s, function, *arguments)["status"]

    assert status(60, 0, os._exit, 7) == "crashed: exit status 7"
    assert status(2, 0, time.sleep, 60) == "out of time: more than 2 s"
    assert status(60, limit, torch.ones, limit // 2) == "out of memory"
    assert status(60, 0, int, "x").startswith("error: ValueError: invalid literal")


def run_sweep(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: Any,
    gates: Callable[[str], str] = lambda way: "passed",
) -> Any:
    """The statuses of a sweep whose measurements come to ``outcomes(way, examples)``."""

    def run(_: Any, *arguments: Any) -> dict[str, Any]:
        *_, kind, case, way, _ = arguments
        return {"status": gates(way)} if kind == "gate" else outcomes(way, case.examples)

    monkeypatch.setattr(isolate.Worker, "run", run)
    monkeypatch.setattr(compare, "points", lambda *_: [case(n) for n in (1, 2, 4)])
    case = lambda n: replace(cases.TINY, examples=n)  # noqa: E731
    arguments = argparse.Namespace(
        case=[], sweep=["examples"], ways=WAYS, tiny=True, device="cpu", results=path
    )
    arguments.run, arguments.limit, arguments.step_limit = "r", 1.0, 10.0
    settings = measuring.Settings("cpu", "float32", 1, 0, 0, True)
    compare.run(list(compare.plan(arguments)), arguments, settings, {"run": "r"})
    rows = harness_rows.rows_of(path, "r")
    return {(r["provider"], r["case"]): r["status"] for r in rows if r["kind"] == "time"}


def test_a_way_stops_behind_a_point_that_fails_or_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcomes(way: str, examples: int) -> dict[str, Any]:
        if (way, examples) == ("sequential", 2):
            return {"status": "out of memory"}
        slow = (way, examples) == ("fast", 1)
        return {"status": "measured", "median_ms": 12_000 if slow else 1}

    status = run_sweep(tmp_path / "r.jsonl", monkeypatch, outcomes)
    assert status["sequential", "examples 2"] == "out of memory"
    assert status["sequential", "examples 4"] == "not run: out of memory at examples 2"
    assert status["fast", "examples 1"] == "measured"
    for point in ("examples 2", "examples 4"):
        assert status["fast", point] == "not run: a step took 12 s at examples 1"
        assert status["ordinary", point] == "measured"


def test_what_came_to_no_result_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.jsonl"
    slow = lambda *_: {"status": "out of time: more than 1 s"}  # noqa: E731
    assert run_sweep(path, monkeypatch, slow)["fast", "examples 2"].startswith("not run")
    quick = lambda *_: {"status": "measured", "median_ms": 1}  # noqa: E731
    assert set(run_sweep(path, monkeypatch, quick).values()) == {"measured"}
    lines = len(path.read_text().splitlines())
    run_sweep(path, monkeypatch, quick)
    assert len(path.read_text().splitlines()) == lines


def test_a_way_with_a_wrong_gradient_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = measuring.Settings("cpu", "float32", 1, 0, 0, True)
    monkeypatch.setitem(baselines.WAYS, "sequential", baselines.WAYS["sequential first-order"])
    row = measuring.gate(cases.TINY, "sequential", settings)
    assert row["error"] > 10 * measuring.ALLOWED_ERROR
    assert row["status"].startswith("failed: wrong in model.")

    gates = {"sequential": row["status"]}
    measured = lambda *_: {"status": "measured", "median_ms": 1}  # noqa: E731
    status = run_sweep(
        tmp_path / "r.jsonl", monkeypatch, measured, lambda way: gates.get(way, "passed")
    )
    assert status["sequential", "examples 1"] == "not run: gate not passed"
    assert status["fast", "examples 4"] == "measured"


def test_the_flops_of_an_ordinary_step_are_those_of_its_products() -> None:
    config = cases.llama(128, 2, 4, 2, 256, 256)
    case = cases.Case(config, examples=3, context_tokens=16, query_tokens=8)
    task = measuring.task_of(case, torch.device("cpu"), torch.float32)
    with FlopCounterMode(display=False) as counter:
        baselines.ordinary(task)
    expected = measuring.flops_of(case, "ordinary", task)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


def test_figures_show_what_was_measured_and_what_ran_out_of_memory(tmp_path: Path) -> None:
    rows = [measured("size", f"size {p}", way, parameters=p) for p in (1e6, 4e6) for way in WAYS]
    rows.append(measured("size", "size 9", "vmap", parameters=4e6, status="out of memory"))
    rows.append(measured("size", "size 9", "vmap", parameters=9e6, status="not run: …"))
    figure = figures.figure_of(rows, "size")
    for axes in figure.axes:
        lines = [line for line in axes.get_lines() if len(line.get_xdata())]
        assert len(lines) == len(WAYS) + 1
        assert list(lines[0].get_xdata()) == [1e6, 4e6]
        cross = next(line for line in lines if line.get_marker() == "x")
        assert list(cross.get_xdata()) == [4e6]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_the_readme_shows_the_newest_rows_of_every_way() -> None:
    rows = [
        measured("", "llama-63m", "fast", median_ms=9e9),
        measured("", "llama-63m", "fast", median_ms=5000, peak_bytes=8e6),
        measured("", "llama-63m", "ordinary", median_ms=2000, ratio_to_ordinary=1.0),
        measured("", "llama-63m", "vmap", status="out of memory"),
        measured("", "llama-63m", "sequential", status="crashed: exit status 1"),
        measured("size", "size 9", "sequential"),
    ]
    text = readme.block(rows)
    title = "Llama, 63 M parameters, 8 examples, 64 + 16 tokens"
    assert f"| {title} | **`fast_meta_step`** | 5.00 s | 2.50 | 8 MB | 2.00 |" in text
    assert f"| {title} | ordinary step | 2.00 s | 1.00 | 4 MB | 1.00 |" in text
    assert f"| {title} | vmap | out of memory | – | – | – |" in text
    assert text.count(title) == 3
    assert "float32, CPU x, 2 threads, torch 2" in text and "medians of at least 7 rounds" in text
    assert "ran with backend torch" in text


def test_the_pages_show_the_committed_rows() -> None:
    for path, text in readme.pages(harness_rows.rows_of(readme.RESULTS / "compare.jsonl")).items():
        assert readme.BEGIN in text and "**`fast_meta_step`**" in text
        assert path.read_text() == text, f"run benchmarks.report.readme: {path} shows other rows"


def test_every_way_has_a_name_in_the_readme_and_a_colour() -> None:
    ways = set(baselines.WAYS)
    assert set(readme.NAMES) == set(figures.COLOURS) == ways
