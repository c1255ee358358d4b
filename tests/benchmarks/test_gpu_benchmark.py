"""benchmarks/gpu.py on a CPU: every row it owes is there, whatever happens to the worker."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.paths import BENCHMARKS

pytest.importorskip("triton", reason="the kernels need Triton")

from gdprompt_fast.ops import backend

SCRIPT = BENCHMARKS / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module("gpu")
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture
def bench(gpu: Any) -> Any:
    return gpu.Bench(torch.device("cpu"), True, [])


def test_a_tiny_run_leaves_every_row_and_all_gates_pass(gpu: Any, tmp_path: Path) -> None:
    results = tmp_path / "results" / "gpu.jsonl"
    command = [sys.executable, str(SCRIPT), "--tiny", "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]

    fields = {*gpu.EMPTY, "run", "device", "torch", "triton", "revision", "dirty"}
    for row in rows:
        assert row.keys() == fields
        assert row["status"] == ("passed" if row["kind"] == "gate" else "interpreter"), row
    for row in (row for row in rows if row["kind"] == "gate"):
        assert row["error"] <= row["allowed_error"]
    for row in (row for row in rows if row["kind"] != "gate"):
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        no_output = row["kind"] == "ceiling" or row["pass"].endswith("_")
        assert row["peak_bytes"] > row["held_bytes"] or no_output
        assert row["op"] == "step" or row["ceiling_ratio"] > 0

    assert set(gpu.PASSES) >= backend.KERNELS, "a kernel that is never timed"
    keys = {(row["kind"], row["op"], row["pass"], row["provider"], row["dtype"]) for row in rows}
    for op in backend.KERNELS:
        for pass_ in gpu.PASS_NAMES[op]:
            for dtype in ("float32", "bfloat16"):
                assert ("gate", op, pass_, "triton", dtype) in keys
            for provider in ("triton", "eager"):
                assert ("time", op, pass_, provider, "bfloat16") in keys
    for op, composite in gpu.COMPOSITES.items():
        for pass_ in composite.names:
            for dtype in ("float32", "bfloat16"):
                assert ("gate", op, pass_, "triton", dtype) in keys
            for provider in ("triton", "eager"):
                assert ("time", op, pass_, provider, "bfloat16") in keys
    assert {row["pass"] for row in rows if row["kind"] == "gate" and row["op"] == "step"} == set(
        gpu.STEP_GATES
    )
    assert "double backward of attention, contexts: " in done.stdout
    for provider, step in gpu.STEPS.items():
        assert ("time", "step", "step", provider, step.dtype) in keys
        assert f"| {provider} |" in done.stdout
    for ceiling in ("copy", "matrix"):
        assert any(row["kind"] == "ceiling" and row["op"] == ceiling for row in rows)


@pytest.mark.parametrize("op", sorted(backend.KERNELS))
def test_the_passes_of_an_op_are_those_of_the_plain_implementation(
    op: str, gpu: Any, bench: Any
) -> None:
    plain = importlib.import_module(f"gdprompt_fast.ops.eager.{op}")
    shapes = {**bench.shapes(gpu.ODD, op), **bench.shapes(gpu.TIMED, op)}
    for shape in shapes.values():
        passes = gpu.PASSES[op](gpu.drawer(bench.device, torch.bfloat16), shape)
        assert set(passes) == set(gpu.PASS_NAMES[op])
        for name, arguments in passes.items():
            for result in gpu.tensors_in(getattr(plain, name)(*arguments)):
                assert result.isfinite().all(), name
            assert (gpu.flops(op, name, shape) is None) == (gpu.ceiling_of(op) == "copy")


def test_the_summary_says_how_attention_grows(gpu: Any) -> None:
    def row(pass_: str, tokens: int, ms: float, held: int, peak: int) -> Any:
        known = dict(kind="time", op="attention", provider="triton", median_ms=ms)
        known |= dict(case=f"one text of {tokens} tokens", held_bytes=held, peak_bytes=peak)
        return {**gpu.EMPTY, **known, "pass": f"attention_{pass_}", "status": "measured"}

    rows = [row("backward", 4096, 2.0, 10, 20), row("backward", 8192, 8.0, 10, 35)]
    rows.append(row("double_backward", 8192, 20.0, 10, 50))
    assert gpu.attention_ratios(rows) == [
        "double backward of attention, one text of 8192 tokens: 2.50 x its backward",
        "attention_backward, 8192 to 4096 tokens: 2.50 x the bytes",
    ]
    assert gpu.attention_ratios(rows)[0] in gpu.summary(rows)


@pytest.mark.parametrize("factor", [1.01, float("nan")], ids=["wrong", "nan"])
def test_a_kernel_that_fails_its_gate_is_not_timed(
    factor: float, gpu: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = importlib.import_module("gdprompt_fast.kernels.swiglu")
    monkeypatch.setattr(kernels, "swiglu_forward", lambda gate, up: factor * gate.sigmoid() * up)
    shape = dict(examples=2, tokens=3, hidden=8)
    known = dict(kind="gate", op="swiglu", case="odd", dtype="float32") | {"pass": "swiglu_forward"}
    row = {
        **gpu.EMPTY,
        **known,
        **gpu.gate(bench, "swiglu", "swiglu_forward", shape, torch.float32),
    }
    assert row["status"].startswith("failed")
    bench.rows.append(row)
    timed = gpu.time_pass(bench, "swiglu", "swiglu_forward", shape, "triton")
    assert timed["status"].startswith("not timed")
    timed = gpu.time_pass(bench, "swiglu", "swiglu_forward", shape, "eager")
    assert timed["status"] == "interpreter"


def test_what_a_case_raises_becomes_its_status(gpu: Any) -> None:
    def raising(error: Exception) -> Any:
        def run() -> None:
            raise error

        return gpu.case("step", "time", "step", run)

    assert gpu.run_case(raising(torch.OutOfMemoryError()), 0)["status"] == "out of memory"
    assert gpu.run_case(raising(KeyError("x")), 0)["status"] == "error: KeyError: 'x'"
    assert gpu.run_case(raising(KeyError("x")), 1e9)["status"] == "out of time"


def test_a_case_that_ends_its_worker_has_a_row_and_the_rest_go_on(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "CASE_LIMIT_S", 2)
    results = tmp_path / "gpu.jsonl"
    worker = """
import json, os, sys, time
for index in range(int(sys.argv[-1]), 4):
    print(json.dumps({"index": index, "row": {"run": "r", "case": index}}), flush=True)
    if index == 1:
        os._exit(7)
    if index == 2:
        time.sleep(60)
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"run": "r", "case": index, "status": "measured"}) + "\\n")
"""
    gpu.supervise([sys.executable, "-c", worker, str(results)], results, time.time())
    assert [row["status"] for row in gpu.rows_of(results, "r")] == [
        "measured",
        "crashed: exit status 7",
        "killed: it took too long",
        "measured",
    ]
