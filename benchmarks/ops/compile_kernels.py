"""Compiles every Triton kernel for GPUs that need not be there, and shows the registers, shared
memory, spills and matrix instructions of each.

    python -m benchmarks.ops.compile_kernels                    # all targets, writes results/
    python -m benchmarks.ops.compile_kernels --targets sm_90 --modules norm

What is compiled of a module of kernels/ stands in ``compile_cases/``. Exits with 1 if a kernel
fails to compile, or spills or overflows the shared memory on sm_90.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: it replaces the compiler

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from ..harness.rows import RESULTS, replace_rows
from ..report.tables import markdown
from .compile_cases import CASES

COMPILED = RESULTS / "compiled_kernels.jsonl"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
MUST_BE_CLEAN = "sm_90"
# Bytes that a kernel may spill: these tiles were the fastest of all on an H200, some without a
# spill among the others, with the bytes that Triton 3.6 and 3.9 spill there.
MAY_SPILL = {
    "attention_double_backward_query_kernel D=64, 64x32": 44,
    "attention_double_backward_query_kernel D=64, bounded, 64x32": 76,
    "attention_double_backward_key_kernel D=64, 64x64": 64,
    "attention_double_backward_key_kernel D=64, bounded, 64x64": 88,
}
MATRIX_INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma": r"(?<!\w)mma\.sync",
    "tcgen05": r"\btcgen05\.mma",
    "mfma": r"\bv_mfma",
}


def cases(
    modules: list[str] | None, targets: list[str]
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Module name, case and target."""
    unknown = set(modules or ()) - set(CASES)
    if unknown:
        raise SystemExit(f"--modules: expected some of {sorted(CASES)}, got {sorted(unknown)}")
    for name in modules or CASES:
        for target in targets:
            yield from ((name, case, target) for case in CASES[name](target))


def compile_case(case: dict[str, Any], target: GPUTarget) -> Any:
    """A triton.compiler.CompiledKernel, of the arguments that a launch would specialise on."""
    kernel, signature, constexprs = case["kernel"], case["signature"], case["constexprs"]
    position = {name: index for index, name in enumerate(kernel.arg_names)}
    paths: list[tuple[int, ...]] = []  # of aligned arguments, and elements of aligned tuples
    for name, type_ in signature.items():
        if isinstance(type_, tuple):
            elements = [(position[name], index) for index in range(len(type_))]
            paths += elements if name in case.get("aligned", ()) else []
        elif type_[0] == "*" or name in case.get("aligned", ()):
            paths.append((position[name],))
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs={(position[name],): value for name, value in constexprs.items()},
        attrs={path: [["tt.divisibility", 16]] for path in paths},
    )
    # As in triton's own defaults: AMD's pipeliner counts its stages differently.
    stages = case["num_stages"] if target.backend == "cuda" else min(2, case["num_stages"])
    options = {"num_warps": case["num_warps"], "num_stages": stages}
    return triton.compile(source, target=target, options=options)


def nvidia_usage(ptx: str, arch: int) -> dict[str, int]:
    """Registers of a thread and bytes spilled, from the assembler that triton uses."""
    name = re.search(r"\.target\s+(\w+)", ptx)
    assert name is not None, "PTX without a .target"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"-arch={name[1]}", file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def total(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log)))

    return {
        "registers": total(r"Used (\d+) registers"),
        "spill_bytes": total(r"(\d+) bytes spill stores") + total(r"(\d+) bytes spill loads"),
    }


def amd_usage(assembly: str) -> dict[str, int]:
    """Vector registers of a thread and bytes spilled, from the kernel's own metadata."""

    def field(name: str) -> int:
        return sum(map(int, re.findall(rf"\.{name}:\s*(\d+)", assembly)))

    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    return {"registers": field("vgpr_count"), "spill_bytes": 4 * spills}


def measure(module: str, case: dict[str, Any], target_name: str) -> dict[str, Any]:
    """One row of the results."""
    row = {
        "module": module,
        "kernel": case["name"],
        "target": target_name,
        "num_warps": case["num_warps"],
        "num_stages": case["num_stages"],
        "constexprs": case["constexprs"],
        "triton": triton.__version__,
    }
    target = TARGETS[target_name]
    try:
        compiled = compile_case(case, target)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"}
    nvidia = target.backend == "cuda"
    assembly = compiled.asm["ptx" if nvidia else "amdgcn"]
    usage = nvidia_usage(assembly, target.arch) if nvidia else amd_usage(assembly)
    counts = {name: len(re.findall(p, assembly)) for name, p in MATRIX_INSTRUCTIONS.items()}
    return row | usage | {"shared_bytes": compiled.metadata.shared} | counts


def problem(row: dict[str, Any]) -> str | None:
    """What keeps the kernel from running well on the row's target."""
    if "error" in row:
        return f"fails to compile: {row['error']}"
    if row["registers"] < 8:  # Triton does this when tensor memory overflows, without an error
        return "compiles to next to nothing"
    if row["spill_bytes"] > MAY_SPILL.get(row["kernel"], 0):
        return f"spills {row['spill_bytes']} bytes"
    if row["shared_bytes"] > SHARED_LIMIT[row["target"]]:
        return f"needs {row['shared_bytes']} of {SHARED_LIMIT[row['target']]} bytes shared memory"
    return None


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = []
    for row in rows:
        matrix = ", ".join(f"{row[n]} {n}" for n in MATRIX_INSTRUCTIONS if row.get(n)) or "none"
        measured = [row.get(n, "") for n in ("registers", "shared_bytes", "spill_bytes")]
        shown = ["fails to compile", "", "", ""] if "error" in row else [*measured, matrix]
        lines.append([row["kernel"], row["target"], row["num_warps"], *shown])
    header = ["kernel", "target", "warps", "registers", "shared bytes", "spilled bytes", "matrix"]
    return markdown(header, lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--modules", nargs="+", help="names in kernels/, all by default")
    parser.add_argument("--results", type=Path, default=COMPILED, help="replaced, one row a line")
    arguments = parser.parse_args()

    work = list(cases(arguments.modules, arguments.targets))
    rows = [measure(*item) for item in tqdm(work, desc="kernels", unit="kernel", disable=None)]
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    replace_rows(arguments.results, rows)
    print(table(rows))
    failed = not rows
    for row in rows:
        if text := problem(row):
            print(f"{row['kernel']} on {row['target']} {text}", file=sys.stderr)
            failed |= "error" in row or row["target"] == MUST_BE_CLEAN
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
