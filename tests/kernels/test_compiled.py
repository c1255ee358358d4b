"""Every kernel is compiled, without a GPU."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

pytest.importorskip("triton", reason="the kernels need Triton")
from benchmarks.ops.compile_cases import CASES
from gdprompt_fast import kernels


def test_every_kernel_has_a_case_to_compile() -> None:
    found = {
        name
        for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
        for name, member in vars(importlib.import_module(module.name)).items()
        if name.endswith("_kernel") and hasattr(member, "arg_names")
    }
    cases = [case for cases_of in CASES.values() for case in cases_of("sm_90")]
    assert {case["kernel"].fn.__name__ for case in cases} == found


def test_every_kernel_compiles_for_sm_90_and_spills_only_where_that_is_faster(
    tmp_path: Path,
) -> None:
    results = tmp_path / "compiled_kernels.jsonl"
    command = [sys.executable, "-m", "benchmarks.ops.compile_kernels", "--targets", "sm_90"]
    command += ["--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results.read_text().count('"target": "sm_90"') > 0
