"""What the benchmarks measure with: memory, time, the revision, and rows of JSON."""

from __future__ import annotations

import gc
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdprompt_fast.models.memory import PeakMemory

ROOT = Path(__file__).resolve().parent.parent
WRITTEN_BY_BENCHMARKS = ("benchmarks/results", "README.md", "docs/measured.md")

Row = dict[str, Any]


def release(device: torch.device) -> None:
    """Frees what the last case left, also in reference cycles of autograd."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure_memory(device: torch.device, call: Callable[[], object], present: list[Tensor]) -> Row:
    """The peak of one call, with what was there before; on a GPU of the second call, so that the
    first one compiles and allocates the workspaces of libraries.
    """
    release(device)
    if device.type == "cuda":
        call()
        release(device)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "held_bytes": held}
    memory = PeakMemory(present)
    held = memory.live_bytes
    with memory:
        call()
    return {"peak_bytes": memory.peak_bytes, "held_bytes": held}


def seconds_of(device: torch.device, call: Callable[[], object]) -> float:
    """Wall-clock time of one call that is waited for."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quantiles(times_ms: Sequence[float]) -> Row:
    """The time columns of a row."""
    ordered = sorted(times_ms)
    last = len(ordered) - 1
    return {
        "p20_ms": ordered[math.floor(0.2 * last)],
        "median_ms": statistics.median(ordered),
        "p80_ms": ordered[math.ceil(0.8 * last)],
        "repeats": len(ordered),
    }


def append(results: Path, row: Row) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def rows_of(results: Path, run: str | None = None) -> list[Row]:
    """The rows of one run, or all."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [row for row in map(json.loads, lines) if run is None or row["run"] == run]


def revision() -> str:
    """Git's, with ``-dirty`` if anything differs but what the benchmarks write; ``unknown`` where
    there is no git.
    """
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        exclude = [f":(exclude){path}" for path in WRITTEN_BY_BENCHMARKS]
        return commit + "-dirty" * bool(_git("status", "--porcelain", "--", ".", *exclude))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
