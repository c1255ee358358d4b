"""Rows of JSON: one schema for what is measured here, and where it comes from."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WRITTEN_BY_BENCHMARKS = ("benchmarks/results", "README.md", "docs/measured.md")

Row = dict[str, Any]

# Every row has every column; None where it does not apply.
WHERE = ("run", "device", "threads", "revision", "dirty")
PACKAGES = ("gdprompt_fast", "torch", "transformers", "peft", "triton")
WHAT = (
    *("section", "kind", "op", "pass", "provider", "backend", "sweep", "case", "dtype", "status"),
    *("shapes", "examples", "context_tokens", "query_tokens", "response_tokens"),
    *("parameters", "layers", "hidden", "vocabulary", "rank", "inner_params"),
    *("captured", "why_eager", "seconds", "memory_limit_bytes"),
)
GATE = ("error", "eager_error", "allowed_error")
TIME = (
    *("p20_ms", "median_ms", "p80_ms", "repeats", "cpu_ms"),
    *("ordinary_ms", "ratio_to_ordinary", "tokens_per_s"),
)
MEMORY = ("peak_bytes", "held_bytes", "reserved_bytes", "process_peak_bytes")
# rate and ceiling_ratio: bytes or FLOPs per second, and their share of the ceiling's.
RATE = ("ceiling", "rate", "ceiling_ratio", "flops", "ceiling_flops_per_s", "flop_utilisation")
COMMAND = ("exit_code", "elapsed_s", "first_loss", "last_loss")  # of a command line that was run
COLUMNS = (*WHERE, *PACKAGES, *WHAT, *GATE, *TIME, *MEMORY, *RATE, *COMMAND)
EMPTY: Row = dict.fromkeys(COLUMNS)


def row_of(**known: Any) -> Row:
    """A row of what is known; ``pass_`` stands for ``pass``.

    Raises:
        ValueError: if a column is none of COLUMNS.
    """
    known = {name.rstrip("_"): value for name, value in known.items()}
    if unknown := known.keys() - EMPTY.keys():
        raise ValueError(f"row: expected columns of COLUMNS, got {sorted(unknown)}")
    return {**EMPTY, **known}


def append(results: Path, row: Row) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def replace_rows(results: Path, rows: Sequence[Row]) -> None:
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(results: Path, run: str | None = None) -> list[Row]:
    """The rows of one run, or all."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [row for row in map(json.loads, lines) if run is None or row["run"] == run]


def environment(run: str, device: torch.device, given_revision: str | None = None) -> Row:
    """The columns WHERE and PACKAGES of a run."""
    commit = given_revision or revision()
    return dict(
        run=run,
        device=device_name(device),
        threads=torch.get_num_threads(),
        revision=commit,
        dirty=commit.endswith("-dirty"),
        **packages(),
    )


def packages() -> dict[str, str | None]:
    """The versions that a row names; None where a package is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join(["CPU", platform.machine(), *models[:1]])


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
