"""A MetaTrainer in several processes, and its example as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.paths import ROOT
from helpers.trainer_process import run


def python(*arguments: str) -> str:
    """What a script prints, with the repository's modules at hand."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_give_what_one_gives_with_the_whole_batch(tmp_path: Path) -> None:
    """Launched by accelerate, which without --multi_gpu would want MPI for two on a CPU."""
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    launch += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    launch += ("--main_process_port", "0")
    script = str(ROOT / "tests" / "helpers" / "trainer_process.py")
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    shared.mkdir()
    alone.mkdir()
    python(*launch, script, str(shared), "2", "2")
    run(alone, 8, 1)
    results: list[dict[str, Any]] = [
        torch.load(path) for path in (*sorted(shared.glob("result-*")), alone / "result-0.pt")
    ]
    first, second, whole = results
    assert [each["processes"] for each in results] == [2, 2, 1]
    for name, value in whole["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-9, atol=1e-12)
    for each in (first, second):
        assert each["losses"] == pytest.approx(whole["losses"], rel=1e-6)  # kept in float32
        assert each["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    assert (shared / "checkpoint-3" / "model.safetensors").is_file()


def test_the_example_learns(tmp_path: Path) -> None:
    steps = ("--max_steps", "4", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true")
    said = python(str(ROOT / "examples" / "meta_trainer.py"), "--output_dir", str(tmp_path), *steps)
    before, after = map(float, re.findall(r"(?:before|after) ([\d.]+)", said))
    assert after < before
    assert (tmp_path / "model.safetensors").is_file()
