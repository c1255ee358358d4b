"""Presets: a file's settings as defaults of the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gdprompt_fast.cli.main import main
from gdprompt_fast.presets import load_preset, preset_arguments
from gdprompt_fast.training.loop import TrainOptions


def test_the_papers_preset_is_one_epoch_of_kl_at_the_papers_rate() -> None:
    options = TrainOptions(**load_preset("paper")["train"])
    assert (options.steps, options.batch_size, options.inner_lr) == (0, 16, 1e-3)
    assert (options.objective, options.inner_params, options.inner_steps) == ("kl", "full", 1)
    assert "outer_lr" not in load_preset("paper")["train"]  # it is searched


def test_a_preset_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[train]\nsteps = 3\n[prepare]\nlr = 1e-4\nnames = ["a", "b"]\n')
    assert load_preset(str(path)) == {
        "train": {"steps": 3},
        "prepare": {"lr": 1e-4, "names": ["a", "b"]},
    }
    known = ["lr", "names", "steps"]
    assert preset_arguments(str(path), "prepare", known) == ["--lr", "0.0001", "--names", "a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"preset: expected a TOML file or one of .*paper.*, got .*mine\.toml"),
        ("[train", r"preset: expected TOML in .*mine\.toml, got "),
        ("[prepare]\nlr = 1.0\n", r"preset: expected a section \[train\] in "),
        ("train = 3\n", r"preset: expected a section \[train\] in "),
        (
            "[train]\nbatchsize = 3\n",
            r"preset: expected in \[train\] of .* only .*batch_size.*steps.*, got batchsize",
        ),
    ],
    ids=["no file", "no TOML", "no section", "no table", "unknown key"],
)
def test_a_bad_preset_is_an_error_that_says_what_is_known(
    text: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text)
    known = [field.name for field in dataclasses.fields(TrainOptions)]
    with pytest.raises(ValueError, match=message):
        preset_arguments(str(path), "train", known)


def test_a_preset_sets_what_no_flag_does(
    tmp_path: Path, model_folder: Path, triples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, output = tmp_path / "mine.toml", tmp_path / "run"
    preset.write_text(
        '[train]\nobjective = "gold"\nsteps = 2\nbatch_size = 3\ninner_lr_grid = [0.1, 0.2]\n'
    )
    command = ["train", "--model", str(model_folder), "--data", str(triples), "--device", "cpu"]
    command += ["--output", str(output), "--preset", str(preset)]
    assert main([*command, "--batch-size", "1"]) == 0
    settings = json.loads((output / "run.json").read_text())
    assert settings["steps"] == 2 and settings["batch_size"] == 1
    assert settings["inner_lr_grid"] == [0.1, 0.2] and settings["objective"] == "gold"
    preset.write_text("[train]\nstep = 2\n")
    assert main([*command, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "gdprompt train: error: preset: expected in [train] of" in error
    assert "batch_size" in error and error.rstrip().endswith("got step")
    preset.write_text("[train]\nsteps = 2.5\n")
    with pytest.raises(SystemExit):
        main([*command, "--resume"])
    assert "argument --steps: invalid int value: '2.5'" in capsys.readouterr().err
