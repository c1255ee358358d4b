"""``gdprompt check``, and the check that training begins with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gdprompt_fast import fast_meta_step
from gdprompt_fast.cli.main import main
from gdprompt_fast.exactness import check, engine
from gdprompt_fast.exactness.report import Precision
from gdprompt_fast.runs import check_run as command


def first_order_only(*args: Any, **options: Any) -> Any:
    """A faulty engine."""
    config = dataclasses.replace(options.pop("config"), first_order=True)
    return fast_meta_step(*args, config=config, **options)


@pytest.fixture
def checked(model_folder: Path, triples: Path) -> list[str]:
    files = ["--model", str(model_folder), "--data", str(triples)]
    return [*files, "--device", "cpu", "--inner-lr", "0.1"]


def test_the_command_prints_the_table_and_its_exit_code_is_the_verdict(
    checked: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "report.json"
    assert main(["check", *checked, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "exact (backend torch, η = 0.1)" in printed
    assert "- First order has a cosine of " in printed, "the rule of thumb is quoted"
    assert json.loads(path.read_text())["exact"] is True
    assert main(["check", *checked, "--inner-lr", "1e-12", "--objective", "gold"]) == 1
    assert "cannot tell" in capsys.readouterr().out
    assert main(["check", *checked, "--examples", "0"]) == 2
    monkeypatch.setattr(engine, "fast_meta_step", first_order_only)
    lora = ["--lora-rank", "1", "--examples", "1", "--objective", "gold"]
    assert main(["check", *checked, *lora]) == 1
    assert "not exact" in capsys.readouterr().out


TRAIN = ["--steps", "2", "--batch-size", "2", "--objective", "gold", "--checkpoint-every", "1"]


def test_training_stops_before_its_first_step_where_the_engine_is_not_exact(
    checked: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = ["train", *checked, *TRAIN, "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "fast_meta_step", first_order_only)
        assert main(train) == 1
        error = capsys.readouterr().err
        assert "stopped: check: expected the exact meta-gradient" in error
        assert "--no-check" in error and not (tmp_path / "metrics.jsonl").exists()
        assert main([*train, "--resume"]) == 1, "a run that has not started is checked"
        assert main([*train, "--resume", "--no-check"]) == 0
    monkeypatch.setattr(command, "check_exactness", None)
    assert main([*train, "--resume"]) == 0, "a run that has started is not checked again"


def test_training_warns_of_what_cannot_be_told_and_of_bf16(
    checked: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = ["train", *checked, *TRAIN]
    small = ["--inner-lr", "1e-12", "--output", str(tmp_path / "a")]
    assert main([*train, *small]) == 0
    assert "warning: check: At η = 1e-12" in capsys.readouterr().err
    poor = Precision((0.94, 1.0), (0.95, 1.0), (1.0, 1.0))
    monkeypatch.setattr(check, "bf16_precision", lambda *_: poor)
    assert main([*train, "--output", str(tmp_path / "b")]) == 0
    assert "warning" not in capsys.readouterr().err
    in_bf16 = ["--compute-dtype", "bfloat16", "--output", str(tmp_path / "c")]
    assert main([*train, *in_bf16]) == 0
    assert "cosine of 0.940" in capsys.readouterr().err
