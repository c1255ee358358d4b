"""benchmarks/gpu.py on a CPU: every row it owes is there, whatever happens to a process."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from benchmarks import gpu
from benchmarks.harness import isolate, jobs, rows
from benchmarks.harness.bench import Bench
from benchmarks.ops import kernels
from benchmarks.ops.composites import COMPOSITES
from benchmarks.ops.shapes import odd_shapes, timed_shapes
from benchmarks.report import gpu as report
from benchmarks.step import command_line, whole
from gdprompt_fast.ops import backend
from gdprompt_fast.testing.gates import tensors_in
from gdprompt_fast.testing.op_inputs import PASS_NAMES, PASSES, drawer, flops

ROOT = rows.ROOT
BENCH = Bench(tiny=True)
# A tiny step takes the interpreter seconds, and the ways that are left out differ in options only;
# so do the gates in fp32, of which one op's are run: tests/kernels holds all others to the same.
LEFT_OUT = (
    r"^command|step warm|16 x \(16|4 x|8B|Adam|micro-groups.* 16|recompute 16|first-order.* 16"
    r"|kernel gate (?!linear ).* float32"
)


def test_a_tiny_run_leaves_every_row_and_all_gates_pass(tmp_path: Path) -> None:
    results = tmp_path / "results" / "gpu.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--results", str(results)]
    command += ["--skip", LEFT_OUT, "--budget", "600", "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=700, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = [json.loads(line) for line in results.read_text().splitlines()]

    for row in found:
        assert row.keys() == rows.EMPTY.keys()
        assert row["status"] == ("passed" if row["kind"] == "gate" else "interpreter"), row
    for row in (row for row in found if row["kind"] == "gate"):
        assert row["error"] <= row["allowed_error"]
    for row in (row for row in found if row["kind"] != "gate"):
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        no_output = row["kind"] == "ceiling" or row["pass"].endswith("_")
        assert row["peak_bytes"] > row["held_bytes"] or no_output
        assert row["ceiling_ratio"] > 0
    steps = {row["provider"]: row for row in found if (row["op"], row["kind"]) == ("step", "time")}
    assert steps["ordinary"]["ratio_to_ordinary"] == 1
    assert steps["fast, captured"]["why_eager"] and steps["fast"]["ratio_to_ordinary"] > 0
    assert steps["fast"]["last_loss"] == pytest.approx(steps["fast, captured"]["last_loss"])
    for label in (row["provider"] for row in steps.values()):
        assert f"| {label} |" in done.stdout
    assert "double backward of attention, contexts: " in done.stdout


def test_no_kernel_pass_or_step_is_without_its_gate_and_its_time() -> None:
    assert set(PASSES) >= backend.KERNELS, "a kernel that is never timed"
    keys = {
        (row["kind"], row["op"], row["pass"], row["provider"], row["dtype"])
        for row in (each.row for each in gpu.all_jobs(BENCH))
    }
    names = {op: PASS_NAMES[op] for op in backend.KERNELS}
    names |= {op: composite.names for op, composite in COMPOSITES.items()}
    for op, passes in names.items():
        for pass_ in passes:
            for dtype in ("float32", "bfloat16"):
                assert ("gate", op, pass_, "triton", dtype) in keys
            for provider in ("triton", "eager"):
                assert ("time", op, pass_, provider, "bfloat16") in keys
    gates = {name for way in whole.WAYS.values() for name in way.gates}
    assert gates <= set(whole.STEP_GATES)
    assert {provider for _, op, _, provider, _ in keys if op == "step"} >= set(whole.WAYS)
    assert {pass_ for kind, _, pass_, *_ in keys if kind == "command"} == {
        "train",
        "evaluate",
        "check",
    }


def test_the_labels_choose() -> None:
    every = gpu.all_jobs(BENCH)
    only = jobs.chosen(every, "^step time .*LoRA", "captured")
    assert [each.row["provider"] for each in only] == ["ordinary", "fast"]
    assert jobs.chosen(every, None, None) == every


def test_a_training_whose_loss_does_not_fall_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    metrics = tmp_path / "run" / "metrics.jsonl"
    losses = [float(step) for step in range(command_line.STEPS)]
    for outer, passed in ((losses[::-1], True), (losses, False), (losses[:0:-1], False)):
        text = [json.dumps({"step": i, "outer_loss": loss}) for i, loss in enumerate(outer, 1)]
        metrics.write_text("".join(f"{line}\n" for line in text))
        row = command_line.losses(tmp_path)
        assert ("status" not in row) == passed, row


@pytest.mark.parametrize("op", sorted(backend.KERNELS))
def test_the_passes_of_an_op_are_those_of_the_plain_implementation(op: str) -> None:
    plain = importlib.import_module(f"gdprompt_fast.ops.eager.{op}")
    shapes = {**odd_shapes(op, True), **timed_shapes(op, True)}
    for shape in shapes.values():
        passes = PASSES[op](drawer(BENCH.device, torch.bfloat16), shape)
        assert set(passes) == set(PASS_NAMES[op])
        for name, arguments in passes.items():
            for result in tensors_in(getattr(plain, name)(*arguments)):
                assert result.isfinite().all(), name
            assert (flops(op, name, shape) is None) == (kernels.ceiling_of(op) == "copy")


def test_the_summary_says_how_attention_grows() -> None:
    def row(pass_: str, tokens: int, ms: float, held: int, peak: int) -> Any:
        known = dict(kind="time", op="attention", provider="triton", median_ms=ms)
        known |= dict(case=f"one text of {tokens} tokens", held_bytes=held, peak_bytes=peak)
        return {**rows.EMPTY, **known, "pass": f"attention_{pass_}", "status": "measured"}

    found = [row("backward", 4096, 2.0, 10, 20), row("backward", 8192, 8.0, 10, 35)]
    found.append(row("double_backward", 8192, 20.0, 10, 50))
    assert report.attention_ratios(found) == [
        "double backward of attention, one text of 8192 tokens: 2.50 x its backward",
        "attention_backward, 8192 to 4096 tokens: 2.50 x the bytes",
    ]
    assert report.attention_ratios(found)[0] in report.summary(found)


def a_run(path: Path, **options: Any) -> jobs.Run:
    def new_worker() -> isolate.Worker:
        return isolate.Worker(isolate.start_method("cpu"))

    options = {"end": time.time() + 600, "job_limit_s": 60, **options}
    return jobs.Run(path / "rows.jsonl", {"run": "r"}, new_worker, **options)


@pytest.mark.parametrize("factor", [1.01, float("nan")], ids=["wrong", "nan"])
def test_a_kernel_that_fails_its_gate_is_not_timed(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = importlib.import_module("gdprompt_fast.kernels.swiglu")
    monkeypatch.setattr(wrong, "swiglu_forward", lambda gate, up: factor * gate.sigmoid() * up)
    shape = dict(examples=2, tokens=3, hidden=8)
    verdict = kernels.gate_pass(BENCH, "swiglu", "swiglu_forward", shape, torch.float32)
    assert verdict["status"].startswith("failed")

    run = a_run(tmp_path)
    of_pass = dict(op="swiglu", pass_="swiglu_forward", case="odd", dtype="float32")
    run.rows.append(rows.row_of(kind="gate", **of_pass, **verdict))
    time_it = functools.partial(
        kernels.time_pass, BENCH, "swiglu", "swiglu_forward", shape, "eager"
    )
    run.do(
        [
            jobs.job(time_it, "main", [("swiglu", "swiglu_forward")], kind="time", **of_pass),
            jobs.job(time_it, "main", kind="time", **of_pass),
        ],
        processes=1,
    )
    gated, free = (row["status"] for row in run.rows[1:])
    assert gated == "not timed: gate on swiglu_forward, odd float32 not passed"
    assert free == "interpreter"


def test_what_a_job_comes_to_becomes_its_row(tmp_path: Path) -> None:
    """In processes beside each other, and in turn; the rest go on."""
    work = {
        "measured": functools.partial(dict, status="measured"),
        "crashed: exit status 7": functools.partial(os._exit, 7),
        "out of time: more than 3 s": functools.partial(time.sleep, 60),
        "error: ValueError: invalid literal for int() with base 10: 'x'": functools.partial(
            int, "x"
        ),
    }
    run = a_run(tmp_path, job_limit_s=3)
    every = [
        jobs.job(function, worker, kind="time", case=status)  # type: ignore[arg-type]
        for worker in ("", "main")
        for status, function in work.items()
    ]
    run.do(every, processes=1)
    written = rows.rows_of(tmp_path / "rows.jsonl", "r")
    assert [row["status"] for row in written] == [row["case"] for row in written] == [*work, *work]

    late = a_run(tmp_path, end=time.time() - 1)
    late.do(every[:1], processes=1)
    assert late.rows[0]["status"] == "out of time"


def test_what_may_have_failed_for_its_neighbours_is_tried_alone(tmp_path: Path) -> None:
    def once(path: Path) -> Any:
        return functools.partial(fail_once, path)

    run = a_run(tmp_path)
    run.do([jobs.job(once(tmp_path / str(i)), kind="time") for i in range(2)], processes=2)
    assert [row["status"] for row in run.rows] == ["measured", "measured"]


def fail_once(path: Path) -> rows.Row:
    if not path.exists():
        path.touch()
        raise torch.OutOfMemoryError()
    return {"status": "measured"}
