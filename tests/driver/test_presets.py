"""Presets: a file's settings as defaults of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gdprompt_fast.cli.main import main
from gdprompt_fast.config.presets import load_preset, read_config
from gdprompt_fast.errors import UserError
from gdprompt_fast.runs import TrainConfig
from gdprompt_fast.training.options import TrainOptions

NEEDED = {"model": "a", "data": "b", "output": "c"}


def test_the_papers_preset_is_one_epoch_of_kl_at_the_papers_rate() -> None:
    options = TrainOptions(**load_preset("paper")["train"])
    assert (options.steps, options.batch_size, options.inner_lr) == (0, 16, 1e-3)
    assert (options.objective, options.inner_params, options.inner_steps) == ("kl", "full", 1)
    assert "outer_lr" not in load_preset("paper")["train"]  # it is searched


def test_a_preset_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nsteps = 3\ninner_lr_grid = [1, 0.5]\n[prepare]\nlr = 1e-4\n")
    assert load_preset(str(path)) == {
        "train": {"steps": 3, "inner_lr_grid": [1, 0.5]},
        "prepare": {"lr": 1e-4},
    }
    config = read_config(TrainConfig, {**NEEDED, "preset": str(path)}, "")
    assert (config.steps, config.inner_lr_grid, config.preset) == (3, (1.0, 0.5), str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"preset: expected a TOML file or one of .*paper.*, got .*mine\.toml"),
        ("[train", r"preset: expected TOML in .*mine\.toml, got "),
        (b"\xff", r"preset: expected TOML in .*mine\.toml, got "),
        ("[prepare]\nlr = 1.0\n", r"mine\.toml, \[train\]: expected such a section, got None"),
        ("train = 3\n", r"mine\.toml, \[train\]: expected such a section, got 3"),
        (
            "[train]\nbatchsize = 3\n",
            r"mine\.toml, \[train\]: expected keys among .*'batch_size'.*'steps'.* got 'batchsize'",
        ),
        ("[train]\nsteps = 2.5\n", r"\[train\]: steps: expected an integer, got 2\.5"),
        ("[train]\nsteps = true\n", r"\[train\]: steps: expected an integer, got True"),
        ('[train]\ninner_lr = "1"\n', r"\[train\]: inner_lr: expected a number, got '1'"),
        ("[train]\ncheck = 1\n", r"\[train\]: check: expected true or false, got 1"),
        ("[train]\ndata = 1\n", r"\[train\]: data: expected a path, got 1"),
        ("[train]\ninner_lr_grid = 1.0\n", r"inner_lr_grid: expected a list, each a number, got"),
    ],
    ids=[
        *("no file", "no TOML", "no text", "no section", "no table", "unknown key"),
        *("float", "bool", "text", "integer", "no path", "no list"),
    ],
)
def test_a_bad_preset_is_an_error_that_says_what_is_known(
    text: str | bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=message):
        read_config(TrainConfig, {**NEEDED, "preset": str(path)}, "")


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
    assert f"gdprompt train: error: preset: {preset}, [train]: expected keys among" in error
    assert "batch_size" in error and error.rstrip().endswith("got 'step'")
    preset.write_text("[train]\nsteps = 2.5\n")
    assert main([*command, "--resume"]) == 2
    assert "[train]: steps: expected an integer, got 2.5" in capsys.readouterr().err
