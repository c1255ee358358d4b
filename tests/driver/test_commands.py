"""The commands from Python and from one TOML file, by the configurations of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gdprompt_fast.cli.main import main
from gdprompt_fast.config.fields import Config, required
from gdprompt_fast.config.presets import load_preset
from gdprompt_fast.errors import UserError
from gdprompt_fast.experiments import EXPERIMENTS, Preset
from gdprompt_fast.runs import (
    COMMANDS,
    CheckConfig,
    DataConfig,
    EvaluateConfig,
    PlanConfig,
    PrepareConfig,
    RunConfig,
    TrainConfig,
    check,
    data,
    evaluate,
    plan,
    prepare,
    run,
    train,
)
from gdprompt_fast.runs.file_run import read_run_file

STEPS: dict[str, Any] = {"steps": 2, "batch_size": 2, "inner_lr": 0.1, "objective": "gold"}


def file_of(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_python_prepares_trains_checks_and_evaluates(
    model_folder: Path, triples: Path, tmp_path: Path
) -> None:
    of = {"data": triples, "device": "cpu"}
    prepare(PrepareConfig(model=model_folder, output=tmp_path / "base", steps=1, **of))
    trained = TrainConfig(model=tmp_path / "base", output=tmp_path / "run", **of, **STEPS)
    results = train(TrainConfig(**{**vars_of(trained), "test_data": triples}))
    assert list(results) == ["before", "after"]
    model = tmp_path / "run" / "model"
    assert check(CheckConfig(model=model, objective="gold", inner_lr=0.1, **of)).exact
    scores = evaluate(EvaluateConfig(model=model, inner_lr=0.1, **of))
    assert scores["settings"] == results["after"]["settings"]


def vars_of(config: Config) -> dict[str, Any]:
    return {each.name: getattr(config, each.name) for each in fields(config) if each.init}


def test_python_and_the_command_line_leave_the_same_run(
    model_folder: Path, triples: Path, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "python", tmp_path / "line"
    train(TrainConfig(model=model_folder, data=triples, output=ours, device="cpu", **STEPS))
    command = ["train", "--model", str(model_folder), "--data", str(triples), "--device", "cpu"]
    command += [part for n, v in STEPS.items() for part in ("--" + n.replace("_", "-"), str(v))]
    assert main([*command, "--output", str(theirs)]) == 0
    for name in ("run.json", "metrics.jsonl", "model/model.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert main([*command, "--output", str(ours), "--resume"]) == 0


def test_a_run_file_runs_its_sections_in_order(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"""
        [data]
        name = "people"
        output = "data"
        train = 8
        test = 4

        [prepare]
        model = "{model_folder.as_posix()}"
        data = "data/train.jsonl"
        output = "base"
        steps = 1

        [train]
        model = "base"
        data = "data/train.jsonl"
        test_data = "data/test.jsonl"
        output = "run"
        preset = "mine.toml"
        steps = 2
        resume = true

        [[evaluate]]
        model = "run/model"
        data = "data/test.jsonl"
        results = "one.json"

        [[evaluate]]
        model = "run/model"
        data = "data/test.jsonl"
        results = "two.json"
        inner_lr = 1

        [report]
        folder = "run"
    """
    file_of(Path("mine.toml"), '[train]\nobjective = "gold"\nsteps = 3\nbatch_size = 2\n')
    path = file_of(Path("all.toml"), text)
    assert main(["run", str(path)]) == 0
    settings = json.loads(Path("run/run.json").read_text())
    assert (settings["steps"], settings["batch_size"], settings["objective"]) == (2, 2, "gold")
    rates = [json.loads(Path(f).read_text())["inner"]["lr"] for f in ("one.json", "two.json")]
    assert rates == [1e-3, 1.0]
    assert Path("run/report.html").is_file()


TRAIN = '[train]\nmodel = "a"\ndata = "b"\noutput = "c"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"all\.toml: expected sections among .*'train'.*, got none"),
        ("[trains]\n", r"all\.toml: expected sections among .*'train'.*, got \[trains\]"),
        ("[train\n", r"file: expected TOML in .*all\.toml, got "),
        ("train = 3\n", r"all\.toml, \[train\]: expected such a section, got 3"),
        ('[train]\nmodel = "a"\n', r"\[train\]: expected the key 'data', got only \['model'\]"),
        (f"{TRAIN}step = 1\n", r"\[train\]: expected keys among .*'steps'.*, got 'step'"),
        (f"{TRAIN}steps = 1.5\n", r"\[train\]: steps: expected an integer, got 1\.5"),
        (f"{TRAIN}inner_lr = 'a'\n", r"\[train\]: inner_lr: expected a number, got 'a'"),
        (f"{TRAIN}objective = 'a'\n", r"\[train\]: objective: expected one of .*, got 'a'"),
        (f"{TRAIN}batch_size = 0\n", r"\[train\]: batch_size: expected an integer >= 1, got 0"),
        (f"{TRAIN}[[evaluate]]\n[[evaluate]]\n", r"\[evaluate\]: expected the key 'model'"),
        (f"{TRAIN}[experiment]\nname = 'table9'\noutput = 'x'\n", r"\[experiment\]: name: expec"),
    ],
)
def test_a_bad_run_file_is_one_clear_line_before_any_work(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(tmp_path / "all.toml", text)
    with pytest.raises(UserError, match=message):
        run.begin(RunConfig(file=path))
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gdprompt run: error: ") and error.count("\n") == 1


def test_a_run_file_stops_where_a_command_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = '[data]\nname = "people"\noutput = "data"\ntrain = 4\ntest = 2\n'
    report = '[report]\nfolder = "data"\n[plan]\nmodel = "none"\n'
    assert main(["run", str(file_of(Path("all.toml"), made + report))]) == 1
    assert "gdprompt run: stopped: all.toml, [report]: folder: expected" in capsys.readouterr().err
    assert main(["run", "none.toml"]) == 2
    assert "file: expected a TOML file, got none.toml" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["paper", "experiments-small", "experiments-paper"])
def test_a_preset_is_a_run_file_that_leaves_some_keys_out(name: str) -> None:
    for section, values in load_preset(name).items():
        known = {each.name for each in fields(COMMANDS[section].config)}
        assert values.keys() <= known


def test_the_sizes_of_experiments_may_stand_in_the_run_file(tmp_path: Path) -> None:
    import gdprompt_fast.presets

    preset = gdprompt_fast.presets.FOLDER / "experiments-small.toml"
    head = f'[experiment]\nname = "table4"\noutput = "{(tmp_path / "new").as_posix()}"\n'
    path = file_of(tmp_path / "all.toml", head + preset.read_text(encoding="utf-8"))
    (config,) = read_run_file(path)
    sizes = config.read_preset()  # type: ignore[attr-defined]
    assert isinstance(sizes, Preset) and sizes.section("table4", EXPERIMENTS["table4"].options)


def test_a_configuration_says_all_that_the_command_line_does(tmp_path: Path) -> None:
    for command in COMMANDS.values():
        assert command.config.__doc__ and command.what and command.__doc__
        for each in fields(command.config):
            assert each.metadata["help"], each.name
        needed = {each.name for each in fields(command.config) if required(each)}
        # what must be given is called the same in all commands; a new name is listed here
        assert needed <= {"name", "model", "data", "output", "folder", "adapter"}, command.name


def test_what_python_gives_is_checked_as_a_file_is() -> None:
    with pytest.raises(UserError, match=r"^steps: expected an integer, got '3'"):
        TrainConfig(model="a", data="b", output="c", steps="3")  # type: ignore[arg-type]
    config = TrainConfig(model="a", data="b", output="c", inner_lr_grid=[1, 2])  # type: ignore[arg-type]
    assert (config.model, config.inner_lr_grid) == (Path("a"), (1.0, 2.0))
    with pytest.raises(TypeError, match="preset"):  # only files and the command line apply one
        TrainConfig(model="a", data="b", output="c", preset="paper")  # type: ignore


def test_data_and_plan_return_and_print(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data(DataConfig(name="people", output=tmp_path / "data", train=4, test=2))
    assert (tmp_path / "data" / "train.jsonl").is_file()
    made = plan(PlanConfig(model=str(model_folder), batch=2, context=8, query=4, response=2))
    assert made.fast.peak_bytes > 0 and "predicted peak" in capsys.readouterr().out


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "gdprompt_fast", "plan", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: gdprompt plan" in shown.stdout
