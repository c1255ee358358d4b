"""The commands, from the command line to the files they leave."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gdprompt_fast.cli.main import main
from gdprompt_fast.data import write_triples
from gdprompt_fast.data.people import make_people_data
from gdprompt_fast.evaluation import read_predictions
from gdprompt_fast.ops import backend
from gdprompt_fast.runs import demo_run
from gdprompt_fast.training.metrics import read_metrics
from helpers.paths import SHARED_DATA

DEMO = ["demo", "--steps", "2", "--test-examples", "6", "--device", "cpu"]
TRAIN = ["--steps", "4", "--batch-size", "2", "--inner-lr", "0.1", "--device", "cpu"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that a demo leaves, and what it prints."""
    output, printed = tmp_path_factory.mktemp("demo") / "demo", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(backend, "load_cpp", lambda: False)  # as in the tests themselves
        assert main([*DEMO, "--output", str(output)]) == 0
    return output, printed.getvalue()


def test_the_demo_in_miniature_writes_everything_it_promises(demo: tuple[Path, str]) -> None:
    output, printed = demo
    for words in ("No Context", "Prompt", "Fine-Tuning", "accuracy before", "gold answers"):
        assert words in printed
    assert (output / "results.md").read_text() in printed
    results = json.loads((output / "results.json").read_text())
    assert list(results) == ["before", *demo_run.OBJECTIVES.values()]
    for result in results.values():
        for setting in ("no_context", "prompt", "fine_tuning"):
            assert result["settings"][setting]["examples"] == 6
    assert len(results["before"]["inner_lr_tried"]) > 4
    assert (output / "figure.png").read_bytes().startswith(b"\x89PNG")
    for objective in demo_run.OBJECTIVES:
        folder = output / objective
        assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        assert model.config.vocab_size == len(tokenizer)


@pytest.mark.quick
def test_a_folder_with_a_run_is_continued_only_on_request_and_with_the_same_settings(
    demo: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path)]
    shutil.copytree(demo[0], tmp_path, dirs_exist_ok=True)
    weights = (tmp_path / "kl" / "model" / "model.safetensors").read_bytes()
    assert main([*DEMO, *output]) == 2
    assert "add --resume" in one_line(capsys)
    assert main([*DEMO, *output, "--resume", "--seed", "1"]) == 2
    assert "seed: expected 0 as in the run" in one_line(capsys)
    assert main([*DEMO, *output, "--resume"]) == 0
    assert (tmp_path / "kl" / "model" / "model.safetensors").read_bytes() == weights


def test_preparation_makes_a_model_folder_that_training_takes(
    model_folder: Path, triples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = tmp_path / "prepared"
    command = ["prepare", "--data", str(triples), "--output", str(prepared), "--steps", "3"]
    command += ["--examples", "4", "--lr", "1e-2", "--device", "cpu"]
    assert main([*command, "--model", str(model_folder)]) == 0
    assert "fine-tuning on 4" in capsys.readouterr().out
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
        for folder in (model_folder, prepared)
    )
    assert not torch.equal(before, after)
    assert main([*command, "--model", str(model_folder)]) == 2
    assert "output: expected a new or empty folder" in one_line(capsys)
    train = ["train", "--model", str(prepared), "--data", str(triples), *TRAIN]
    assert main([*train, "--answer-tokens", "3", "--output", str(tmp_path / "run")]) == 0


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed as an error: one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("gdprompt ") and ": error: " in error
    return error


@pytest.mark.quick
@pytest.mark.parametrize("objective", ["gold", "kl"])
def test_train_then_evaluate(
    objective: str,
    model_folder: Path,
    triples: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    files = ["--model", str(model_folder), "--data", str(triples), "--test-data", str(triples)]
    settings = ["--objective", objective, "--answer-tokens", "3", "--output", str(output)]
    assert main(["train", *files, *settings, *TRAIN]) == 0
    assert "9 of 9 records kept" in capsys.readouterr().out
    assert (output / "figure.png").is_file() and (output / "results.json").is_file()
    results = tmp_path / "results.json"
    command = ["evaluate", "--model", str(output / "model"), "--data", str(triples)]
    answers = ["--answer-tokens", "3", "--results", str(results)]
    assert main([*command, "--inner-lr", "0.1", *answers]) == 0
    assert "Fine-Tuning: η = 0.1" in capsys.readouterr().out
    after = json.loads((output / "results.json").read_text())["after"]
    assert json.loads(results.read_text())["settings"] == after["settings"]


def test_a_teachers_cache_serves_several_runs_but_no_other_settings(
    model_folder: Path, triples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", str(model_folder), "--data", str(triples), *TRAIN]
    command += ["--teacher-cache", str(tmp_path / "teacher"), "--output"]
    assert main([*command, str(tmp_path / "a"), "--answer-tokens", "3"]) == 0
    assert not (tmp_path / "a" / "teacher").exists()
    written = [path.stat().st_mtime_ns for path in (tmp_path / "teacher").glob("shard-*")]
    assert main([*command, str(tmp_path / "b"), "--answer-tokens", "3", "--seed", "1"]) == 0
    assert written == [path.stat().st_mtime_ns for path in (tmp_path / "teacher").glob("shard-*")]
    capsys.readouterr()
    assert main([*command, str(tmp_path / "c"), "--answer-tokens", "4"]) == 2
    assert "was made with another answer_tokens" in one_line(capsys)
    assert not (tmp_path / "c").exists()


def test_training_examples_among_the_test_data_are_counted(
    model_folder: Path, triples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "test.jsonl"
    lines = triples.read_text().splitlines(keepends=True)
    unseen = make_people_data(1, 4, seed=1).test.to_list()
    write_triples(unseen, test)
    command = ["train", "--model", str(model_folder), "--data", str(triples), *TRAIN]
    command += ["--objective", "gold", "--test-data", str(test), "--output"]
    assert main([*command, str(tmp_path / "a")]) == 0
    assert "warning" not in capsys.readouterr().err
    test.write_text(test.read_text() + lines[0] + lines[5])
    assert main([*command, str(tmp_path / "b")]) == 0
    assert "warning: 2 of 6 examples of --test-data" in capsys.readouterr().err


def test_train_adapters_then_evaluate_them(
    model_folder: Path, triples: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="PEFT is an optional dependency")
    output = tmp_path / "run"
    command = ["train", "--model", str(model_folder), "--data", str(triples), *TRAIN]
    lora = ["--lora-rank", "1", "--inner-params", "lora", "--objective", "gold"]
    assert main([*command, *lora, "--output", str(output)]) == 0
    assert (output / "model" / "adapter_model.safetensors").is_file()
    command = ["evaluate", "--model", str(output / "model"), "--data", str(triples)]
    assert main([*command, "--inner-params", "lora", "--device", "cpu"]) == 0


@pytest.mark.parametrize("order", [[], ["--one-after-another"]], ids=["at once", "in turn"])
def test_evaluate_groups_of_contexts_and_keep_every_answer(
    order: list[str],
    model_folder: Path,
    triples: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results, predictions = tmp_path / "results.json", tmp_path / "predictions.jsonl"
    command = ["evaluate", "--model", str(model_folder), "--data", str(triples)]
    groups = ["--contexts-per-group", "4", "--answer-tokens", "4", *order]
    files = ["--results", str(results), "--predictions", str(predictions)]
    assert main([*command, *groups, *files]) == 0
    printed = capsys.readouterr().out
    assert "8 examples, ± one standard error" in printed  # of 9: two groups of 4
    for row in ("| accuracy ", "| token accuracy ", "| exact match ", "| F1 ", "| NLL per token "):
        assert row in printed
    result = json.loads(results.read_text())
    assert result["contexts_per_group"] == 4 and result["one_after_another"] is bool(order)
    rows = read_predictions(predictions)
    assert len(rows) == 8
    mean = sum(row["settings"]["fine_tuning"]["f1"] for row in rows) / 8
    assert result["settings"]["fine_tuning"]["f1"] == pytest.approx(mean)


def test_evaluate_without_answers(
    model_folder: Path, triples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", str(model_folder), "--data", str(triples)]
    assert main([*command, "--answer-tokens", "0"]) == 0
    printed = capsys.readouterr().out
    assert "| accuracy " in printed and "exact match" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--answer-tokens", "127"], "answer_tokens: expected fewer than the model's positions"),
        (["--answer-tokens", "-1"], "answer_tokens: expected an integer >= 0, got -1"),
        (["--contexts-per-group", "10"], "contexts_per_group: expected at most the number of"),
        (["--predictions", "no/folder/p.jsonl"], "predictions: expected a file in an existing"),
        (["--inner-lr", "inf"], "inner_lr: expected a finite number >= 0, got inf"),
    ],
)
def test_bad_input_to_evaluate_is_one_clear_line(
    arguments: list[str],
    message: str,
    model_folder: Path,
    triples: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["evaluate", "--model", str(model_folder), "--data", str(triples)]
    assert main([*command, *arguments]) == 2
    assert message in one_line(capsys)


def test_evaluate_can_tune_the_inner_rate(
    model_folder: Path, triples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", str(model_folder), "--data", str(triples)]
    assert main([*command, "--tune-inner-lr", "--inner-lr-grid", "0.02", "0.04"]) == 0
    printed = capsys.readouterr().out
    assert "η = 0.02" in printed or "η = 0.04" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "no/such/folder"],
            "model: expected a folder with a config.json or the name of",
        ),
        (["--data", "no-such.jsonl"], "no-such.jsonl: expected a JSONL file"),
        (["--data", "bad.jsonl"], 'bad.jsonl, line 1: expected the field "response"'),
        (["--inner-lr", "-1"], "inner_lr: expected a finite number >= 0, got -1.0"),
        (["--batch-size", "0"], "batch_size: expected an integer >= 1, got 0"),
        (["--inner-params", "lora"], "inner_params: expected to select some parameters"),
        (["--max-context-tokens", "5"], "got none: 0 of 9 records kept; dropped 9: context longer"),
        (["--device", "no-such-device"], "device: expected one that is there"),
        (["--test-data", "test.jsonl", "--eval-batch-size", "0"], "eval_batch_size: expected an"),
        (["--output", "full"], "output: expected a new or empty folder"),
        (["--dtype", "bfloat16"], "dtype: expected float32 to train all weights, got bfloat16"),
        (["--objective", "kl", "--answer-tokens", "5000"], "answer_tokens: expected fewer than"),
        (["--teacher-cache", "full"], "teacher_cache: expected a cache or a new or empty folder"),
        (["--preset", "no-such"], "preset: expected a TOML file or one of experiments-paper, "),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    model_folder: Path,
    triples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"context": "a", "query": "b"}\n')
    Path("test.jsonl").write_text(triples.read_text())
    Path("full").mkdir()
    Path("full/something").write_text("")
    good = ["--model", str(model_folder), "--data", str(triples), "--output", "run"]
    assert main(["train", *good, *arguments]) == 2
    assert message in one_line(capsys)
    assert not Path("run").exists()


def test_a_broken_model_and_a_place_for_no_results_are_one_clear_line(
    model_folder: Path, triples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    command = ["evaluate", "--data", str(triples), "--model"]
    assert main([*command, str(broken)]) == 2
    assert "error: model: expected a whole safetensors file, got " in capsys.readouterr().err
    assert main([*command, str(model_folder), "--results", "no/such/folder/r.json"]) == 2
    assert "error: results: expected a file in an existing folder" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(
    "command", [[], ["demo"], ["train"], ["search-outer-lr"], ["evaluate"], ["plan"]], ids=str
)
def test_help_names_options_and_defaults(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "default: " in printed if command else "evaluate" in printed


def test_train_and_evaluate_a_real_checkpoint_on_real_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = SHARED_DATA / "models" / "TinyStories-656K"
    squad = SHARED_DATA / "squad" / "squad-v1.1-subset.json"
    if not (model.is_dir() and squad.is_file()):
        pytest.skip("the TinyStories-656K checkpoint or SQuAD is not in ../shared/data")
    article = json.loads(squad.read_text())["data"][0]
    records = [
        {
            "context": paragraph["context"],
            "query": question["question"],
            "response": question["answers"][0]["text"],
        }
        for paragraph in article["paragraphs"][10:20]  # one of them is too long
        for question in paragraph["qas"][:1]
    ]
    write_triples(records, tmp_path / "squad.jsonl")
    files = ["--model", str(model), "--data", str(tmp_path / "squad.jsonl"), "--device", "cpu"]
    limits = ["--max-context-tokens", "400", "--max-prompt-tokens", "480"]
    steps = ["--steps", "2", "--batch-size", "2", "--objective", "kl", "--answer-tokens", "4"]
    output = ["--output", str(tmp_path / "run")]
    assert main(["train", *files, *limits, *steps, *output]) == 0
    assert "records kept; dropped" in capsys.readouterr().out
    assert all(row["query_loss"] > 0 for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    trained = ["--model", str(tmp_path / "run" / "model")]
    assert main(["evaluate", *files, *limits, *trained]) == 0
    assert "Fine-Tuning" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_other_triples_under_the_same_name(
    model_folder: Path, triples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    lines = triples.read_text().splitlines()
    data.write_text("\n".join(lines) + "\n")
    command = ["train", "--model", str(model_folder), "--data", str(data)]
    command += ["--output", str(tmp_path / "run"), "--objective", "gold", "--steps", "1"]
    assert main(command) == 0
    data.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    assert main([*command, "--resume"]) == 2
    assert "error: data_sha256: expected " in capsys.readouterr().err
