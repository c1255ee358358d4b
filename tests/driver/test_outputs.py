"""The user's files are the user's: what a command may write over, and what it never does."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gdprompt_fast.artifacts.files import ASIDE
from gdprompt_fast.artifacts.stage import run_stage
from gdprompt_fast.cli.main import main
from gdprompt_fast.data import read_triples, write_triples
from gdprompt_fast.data.people import make_people_data
from gdprompt_fast.loading import load_config
from gdprompt_fast.plan import PlannedStep, make_plan
from gdprompt_fast.runs import experiment_run, plan_run

Refused = Callable[..., str]
EVALUATE = ["--answer-tokens", "0", "--device", "cpu"]
TRAIN = ["--objective", "gold", "--steps", "1", "--batch-size", "2", "--device", "cpu"]


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder of the user's own data."""
    folder = tmp_path / "mine"
    folder.mkdir()
    write_triples(make_people_data(1, 9, seed=0).test.to_list(), folder / "train.jsonl")
    return folder


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """``refused(*arguments)``: that a command is, in one line, with every file as it was."""

    def check(*arguments: str | Path) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert snapshot(tmp_path) == before
        assert printed.err.count("\n") == 1 and printed.out == ""
        return printed.err

    return check


def links(file: Path) -> list[Path]:
    """The same file under other names."""
    symbolic, hard = file.with_name("symbolic"), file.with_name("hard")
    symbolic.symlink_to(file.name)
    os.link(file, hard)
    return [file, symbolic, hard]


def test_data_replaces_only_data_of_its_own(mine: Path, refused: Refused) -> None:
    people = ["data", "people", "--test", "2", "--train", "3", "--output"]
    assert "--overwrite" in refused(*people, mine)
    output = mine / "made"
    assert main([*people, str(output)]) == 0 and main([*people, str(output)]) == 0
    train = output / "train.jsonl"
    train.write_text(train.read_text() + train.read_text().splitlines()[0] + "\n")
    assert "--overwrite" in refused(*people, output)  # a row added by hand
    assert main([*people, str(output), "--overwrite"]) == 0
    assert len(read_triples(train)) == 3


def test_data_never_replaces_its_source(mine: Path, refused: Refused, tmp_path: Path) -> None:
    outside = tmp_path / "outside.jsonl"
    os.link(mine / "train.jsonl", outside)
    (tmp_path / "link.jsonl").symlink_to(mine / "train.jsonl")
    for source in (mine / "train.jsonl", outside, tmp_path / "link.jsonl"):
        command = ["data", "jsonl", "--source", source, "--output", mine]
        assert "output: expected" in refused(*command)
        assert "output: expected a folder without" in refused(*command, "--overwrite")


def test_evaluate_never_replaces_an_input(mine: Path, model_folder: Path, refused: Refused) -> None:
    files = links(mine / "train.jsonl")
    command = ["evaluate", "--model", model_folder, *EVALUATE, "--data"]
    for data, written in zip(files, [*files[1:], files[0]], strict=True):
        for option in ("--results", "--predictions"):
            for more in ([], ["--overwrite"]):
                error = refused(*command, data, option, written, *more)
                assert "expected another file than an input" in error
    config = model_folder / "config.json"
    error = refused(*command, files[0], "--results", config, "--overwrite")
    assert "expected a file that is no part of an input" in error


def test_evaluate_replaces_results_of_its_own_and_others_on_request(
    mine: Path, model_folder: Path, refused: Refused
) -> None:
    data, results, predictions = (mine / name for name in ("train.jsonl", "r.json", "p.jsonl"))
    command = ["evaluate", "--model", str(model_folder), "--data", str(data), *EVALUATE]
    assert main([*command, "--results", str(results)]) == 0
    assert main([*command, "--results", str(results)]) == 0
    assert json.loads(results.read_text())["written_by"] == "gdprompt evaluate"
    assert "expected another file" in refused(
        *command, "--results", mine / "new", "--predictions", mine / "new"
    )
    assert main([*command, "--predictions", str(predictions)]) == 0
    assert "--overwrite" in refused(*command, "--predictions", predictions)
    results.write_text('{"mine": 1}')
    assert "--overwrite" in refused(*command, "--results", results)
    assert main([*command, "--results", str(results), "--overwrite"]) == 0
    assert "settings" in json.loads(results.read_text())


def test_plan_and_report_replace_files_of_their_own(
    mine: Path, model_folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_plan(load_config(model_folder / "config.json"), PlannedStep(batch=1, context=16))
    monkeypatch.setattr(plan_run, "make_plan", lambda *_: made)  # seconds, and all the same here
    json_file = mine / "plan.json"
    plan = [
        "plan",
        "--model",
        str(model_folder / "config.json"),
        "--response",
        "4",
        "--context",
        "16",
        "--query",
        "9",
    ]
    json_file.write_text('{"written_by": "gdprompt evaluate"}')
    assert "--overwrite" in refused(*plan, "--json", json_file)
    for _ in range(2):
        json_file.unlink()
        assert main([*plan, "--json", str(json_file)]) == 0
        assert main([*plan, "--json", str(json_file)]) == 0
    config = model_folder / "config.json"
    assert "another file than an input" in refused(*plan, "--json", config, "--overwrite")
    run, page = mine / "run", mine / "run" / "report.html"
    train = ["train", "--model", str(model_folder), "--data", str(mine / "train.jsonl"), *TRAIN]
    assert main([*train, "--output", str(run)]) == 0
    page.write_text("<html><head></head>my notes</html>")
    assert "--overwrite" in refused("report", run)
    assert main(["report", str(run), "--overwrite"]) == 0 and main(["report", str(run)]) == 0
    assert "my notes" not in page.read_text()


@pytest.mark.parametrize("command", ["prepare", "train", "search-outer-lr", "demo", "experiment"])
def test_a_folder_of_others_is_refused_before_any_work(
    command: str, mine: Path, model_folder: Path, refused: Refused
) -> None:
    data = mine.parent / "data.jsonl"
    os.rename(mine / "train.jsonl", data)
    (mine / "notes.txt").write_text("mine")
    files = ["--model", model_folder, "--data", data]
    arguments = {
        "prepare": [*files, "--steps", "1"],
        "train": [*files, *TRAIN],
        "search-outer-lr": [*files, "--test-data", data, *TRAIN],
        "demo": [],
        "experiment": ["table4"],
    }[command]
    error = refused(command, *arguments, "--output", mine)
    assert "output: expected a new or empty folder" in error and "--overwrite" in error
    if files[0] in arguments:
        os.link(data, mine / "the same.jsonl")
        error = refused(command, *arguments, "--output", mine, "--overwrite")
        assert "expected a folder without files of an input" in error


def test_a_run_is_replaced_on_request(mine: Path, model_folder: Path, refused: Refused) -> None:
    data, run = mine / "train.jsonl", mine / "run"
    command = ["train", "--model", str(model_folder), "--data", str(data), *TRAIN]
    command += ["--output", str(run)]
    assert main(command) == 0
    (run / "notes.txt").write_text("of the old run")
    assert "add --resume" in refused(*command, "--seed", "1")
    assert main([*command, "--seed", "1", "--overwrite"]) == 0
    assert not (run / "notes.txt").exists()
    assert json.loads((run / "run.json").read_text())["seed"] == 1
    cached = [*command, "--teacher-cache", run / "model", "--overwrite"]
    assert "output: expected a folder without the teacher_cache" in refused(*cached)


def test_an_experiment_does_not_replace_a_result_that_is_none(mine: Path, refused: Refused) -> None:
    (mine / "stages").mkdir()
    for name in ("table4.md", "table4.json"):
        (mine / name).write_text('{"mine": 1}')
        assert f"{name}: expected" in refused("experiment", "table4", "--output", mine)
        (mine / name).unlink()


def test_damaged_experiments_are_one_clear_line(mine: Path, refused: Refused) -> None:
    output = mine / "experiments"
    output.mkdir()
    for text in ('{"experiment": "table4", "title"', '{"experiment": "table4", "title": "T"}'):
        (output / "table4.json").write_text(text)
        assert "table4.json: expected results as written" in refused("report", output)
    stage = output / "stages" / "seed-0" / "data" / "stage.json"
    stage.parent.mkdir(parents=True)
    for text in ("{", "[]", "{}", '{"settings": 1}'):
        stage.write_text(text)
        with pytest.raises(ValueError, match=r"stage\.json: expected"):
            run_stage(stage.parent, {}, lambda folder: {})


def test_an_experiment_replaces_a_folder_of_others_on_request(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = mine.parent / "table.md"
    monkeypatch.setattr(experiment_run, "run_experiment", lambda name, labs: table)
    table.write_text("the table")
    assert main(["experiment", "table4", "--output", str(mine), "--overwrite"]) == 0
    assert [path.name for path in mine.iterdir()] == ["stages"]


def test_the_current_folder_and_those_above_are_never_replaced(
    mine: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.chdir(mine)
    for output in (".", ".."):
        error = refused("data", "people", "--output", output, "--overwrite")
        assert "output: expected another folder than the current one" in error


def test_a_command_finds_a_folder_that_a_killed_one_had_set_aside(
    mine: Path, model_folder: Path, tmp_path: Path
) -> None:
    mine.rename(tmp_path / f".mine{ASIDE}")
    command = ["evaluate", "--model", str(model_folder), *EVALUATE]
    assert main([*command, "--data", str(mine / "train.jsonl")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_is_written_beside_a_folder_is_not_in_it(
    mine: Path, model_folder: Path, refused: Refused
) -> None:
    output = mine / "made"
    output.mkdir()
    people = ["data", "people", "--test", "2", "--train", "3", "--output", output, "--dropped"]
    assert "dropped: expected a path that is not in --output" in refused(*people, output / "d.json")
    given = ["--model", model_folder, "--data", mine / "train.jsonl", "--output", output]
    error = refused("prepare", *given, "--dropped", output / "d.json")
    assert "dropped: expected a path that is not in --output" in error
    error = refused("train", *given, *TRAIN, "--teacher-cache", output)
    assert "teacher_cache: expected another file than for output" in error


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_an_output_is_a_regular_file(mine: Path, model_folder: Path) -> None:
    os.mkfifo(mine / "pipe")
    command = ["evaluate", "--model", str(model_folder), "--data", str(mine / "train.jsonl")]
    for path in (mine / "pipe", Path(os.devnull)):
        assert main([*command, "--results", str(path), "--overwrite"]) == 2
    assert not Path(os.devnull).is_file()


def test_a_loop_of_links_is_no_folder(mine: Path, refused: Refused) -> None:
    one, other = mine / "one", mine / "other"
    one.symlink_to(other)
    other.symlink_to(one)
    assert "a loop of links" in refused("data", "people", "--output", one)


def test_results_are_written_whatever_the_terminal_can_show(
    mine: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    command = ["evaluate", "--model", str(model_folder), "--data", str(mine / "train.jsonl")]
    assert main([*command, *EVALUATE, "--results", str(mine / "r.json")]) == 0
    terminal.seek(0)
    assert "examples, \\xb1 one standard error" in terminal.read()
    assert (mine / "r.json").is_file()
