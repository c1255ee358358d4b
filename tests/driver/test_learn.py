"""``gdprompt learn`` and ``gdprompt ask``: texts become adapters, which are asked."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gdprompt_fast import InnerUpdate
from gdprompt_fast.cli.main import main
from gdprompt_fast.data import pad, read_triples
from gdprompt_fast.loading import add_lora, load_model
from gdprompt_fast.runs import (
    AskConfig,
    EvaluateConfig,
    LearnConfig,
    ask,
    evaluate,
    learn,
    learn_run,
)
from helpers.kept import config_in, tensors_in, with_peft
from helpers.killing import Killed, killed_after

pytest.importorskip("peft", reason="PEFT is an optional dependency")

CPU = torch.device("cpu")
RATE = ["--inner-lr", "0.5", "--device", "cpu"]
BAD_INPUT = 2


@pytest.fixture
def texts(triples: Path, tmp_path: Path) -> list[Path]:
    """Two of the passages, each a file."""
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file, row in zip(files, read_triples(triples), strict=False):
        file.write_text(row["context"] + "\n")
    return files


def command(name: str, model: Path, *more: object) -> list[str]:
    return [name, "--model", str(model), "--device", "cpu", *map(str, more)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.quick
def test_every_text_becomes_an_adapter_that_plain_peft_loads(
    model_folder: Path, triples: Path, texts: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = ["--text", *texts, "--data", triples, "--inner-lr", 0.5, "--output", output]
    assert main(command("learn", model_folder, *options, "--batch-size", 2)) == 0
    folders = sorted(path.name for path in output.iterdir() if path.is_dir())
    # the file's first two passages are those of the text files, and so learnt once
    assert folders == sorted(["one", "two", *(str(line) for line in range(3, 10))])
    kept = json.loads((output / "adapters.json").read_text())["kept"]
    assert [entry["folder"] for entry in kept][:3] == ["one", "two", "3"]
    _, tokenizer = load_model(model_folder, "float32", CPU)
    for name, file in (("one", texts[0]), ("two", texts[1])):
        base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
        ids = torch.tensor([tokenizer(file.read_text().strip())["input_ids"]])
        with torch.no_grad():
            before = base(ids, labels=ids).loss
            after = with_peft(base, output / name)(ids, labels=ids).loss
        assert after < before - 0.1
    assert config_in(output / "one")["base_model_name_or_path"] == str(model_folder)


def test_an_adapter_answers_as_the_evaluation_does(
    model_folder: Path, triples: Path, tmp_path: Path
) -> None:
    answers = tmp_path / "answers.jsonl"
    of = dict(model=model_folder, data=triples, device="cpu", inner_lr=0.5)
    evaluate(EvaluateConfig(**of, predictions=answers, answer_tokens=6))
    learn(LearnConfig(**of, output=tmp_path / "out", batch_size=4))
    for number, line in enumerate(answers.read_text().splitlines(), start=1):
        row = json.loads(line)
        options: dict[str, Any] = dict(model=model_folder, device="cpu", answer_tokens=6)
        options |= dict(adapter=tmp_path / "out" / f"{number}", compare=True)
        (said,) = ask(AskConfig(question=row["query"], **options))
        assert said == {name: each["answer"] for name, each in row["settings"].items()}


@pytest.mark.parametrize("form", ["lora", "full"])
def test_learning_that_was_killed_goes_on_to_the_same_bytes(
    form: str, model_folder: Path, triples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = command("learn", model_folder, "--data", triples, "--form", form, "--batch-size", 4)
    assert main([*line, "--output", str(tmp_path / "whole")]) == 0
    killed = [*line, "--output", str(tmp_path / "killed")]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(learn_run, "save", killed_after(6, learn_run.save))
        main(killed)
    assert len([p for p in (tmp_path / "killed").iterdir() if p.is_dir()]) == 6
    assert not (tmp_path / "killed" / "adapters.json").exists()
    assert main(killed) == BAD_INPUT  # without --resume
    assert main([*killed, "--resume", "--inner-lr", "0.1"]) == BAD_INPUT
    assert main([*killed, "--resume"]) == 0
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    assert main([*killed, "--resume"]) == 0


def test_a_whole_model_is_kept_with_its_tokenizer(
    model_folder: Path, texts: list[Path], tmp_path: Path
) -> None:
    line = command("learn", model_folder, "--text", texts[0], "--form", "full", *RATE[:2])
    assert main([*line, "--output", str(tmp_path / "out")]) == 0
    model, tokenizer = load_model(tmp_path / "out" / "one", "float32", CPU)
    assert tokenizer(texts[0].read_text())["input_ids"]
    assert model.config.architectures == ["LlamaForCausalLM"]


def test_for_vllm_linear_layers_alone_are_moved(
    model_folder: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = command("learn", model_folder, "--text", texts[0], "--for-vllm", "--rank", 3, *RATE[:2])
    assert main([*line, "--output", str(tmp_path / "out")]) == 0
    config = config_in(tmp_path / "out" / "one")
    assert config["r"] == 8 and config["modules_to_save"] is None and not config["rank_pattern"]
    keys = tensors_in(tmp_path / "out" / "one")
    assert not any("lm_head" in key or "norm" in key for key in keys)
    said = capsys.readouterr().out
    assert "what the worst of them lost of each layer" in said
    assert said.count("model.layers.") == len(config["target_modules"]) * 2  # in both its layers


def test_a_model_with_trained_adapters_learns_and_is_asked(
    model_folder: Path, texts: list[Path], tmp_path: Path
) -> None:
    model, _ = load_model(model_folder, "float32", CPU)
    lora = add_lora(model, 2, seed=0)
    for name, parameter in lora.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.3)
    lora.save_pretrained(str(tmp_path / "trained"))
    trained = tmp_path / "trained"
    assert main(command("learn", trained, "--text", texts[0], "--output", tmp_path / "out")) == 0
    base, tokenizer = load_model(model_folder, "float32", CPU)
    update = InnerUpdate.from_pretrained(tmp_path / "out" / "one", base)
    ids, _ = pad([tokenizer(texts[0].read_text())["input_ids"]])
    with torch.no_grad(), update.applied_to(base, torch.tensor([0])):
        after = base(ids).logits
        assert (after - lora(ids).logits).norm() < 0.2 * after.norm()  # θ with its adapters, moved
    options: dict[str, Any] = dict(adapter=tmp_path / "out" / "one", question="who ?", device="cpu")
    ours = ask(AskConfig(model=trained, compare=True, **options))
    assert ours[0]["fine_tuning"] == ask(AskConfig(model=model_folder, **options))[0]["fine_tuning"]


@pytest.fixture
def adapter(model_folder: Path, texts: list[Path], tmp_path: Path) -> Path:
    learn(LearnConfig(model=model_folder, text=texts[:1], output=tmp_path / "out", device="cpu"))
    return tmp_path / "out" / "one"


def test_questions_are_typed_one_after_another(
    model_folder: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"who ?\n\nwhat ?\n{'who ' * 500}\nwhere ?\n"))
    line = command("ask", model_folder, "--adapter", adapter, "--compare", "--answer-tokens", 4)
    capsys.readouterr()
    assert main(line) == 0
    said = capsys.readouterr().out
    for setting in ("No Context: ", "Prompt:     ", "Fine-Tuning:"):
        assert said.count(setting) == 3
    assert said.count("question: expected rows of at most 124 tokens") == 1


def test_the_text_of_an_adapter_may_be_given(
    model_folder: Path, adapter: Path, texts: list[Path], tmp_path: Path
) -> None:
    line = command("ask", model_folder, "--adapter", adapter, "--compare", "who ?")
    record = adapter / "gdprompt.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "texts": []}))
    assert main(line) == BAD_INPUT
    assert main([*line, "--text", str(texts[1])]) == 0


def test_a_file_of_commands_learns_and_asks(
    model_folder: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = {name: path.as_posix() for name, path in zip("ab", texts, strict=True)}
    (tmp_path / "all.toml").write_text(f"""
        [learn]
        model = "{model_folder.as_posix()}"
        text = ["{where["a"]}", "{where["b"]}"]
        output = "{(tmp_path / "out").as_posix()}"
        inner_lr = 0.5
        resume = true

        [ask]
        model = "{model_folder.as_posix()}"
        adapter = "{(tmp_path / "out" / "two").as_posix()}"
        question = "who ?"
    """)
    assert main(["run", str(tmp_path / "all.toml")]) == 0
    assert "2 texts learnt" in capsys.readouterr().out


def test_records_have_names_that_folders_can_have(model_folder: Path, tmp_path: Path) -> None:
    text = "the mother of Anna is Maria"
    rows = [
        {"context": text, "id": "a/b"},
        {"context": f"{text} {text}", "id": "A_B"},
        {"context": f"{text} the", "id": ".."},
        {"text": f"{text} mother", "id": 7, "context_loss": [[0, 10]]},
        {"context": text},
        {"context": f"{text} Maria", "id": "adapters.json"},
        {"context": f"{text} Anna", "id": "Run.json"},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = learn(LearnConfig(model=model_folder, data=data, output=tmp_path / "out", device="cpu"))
    assert [entry["folder"] for entry in kept] == [
        *("a_b", "A_B-2", "_..", "7", "adapters.json-2", "Run.json-2")
    ]
    assert [entry["line"] for entry in kept] == [1, 2, 3, 4, 6, 7]


def test_texts_too_long_are_dropped_and_listed(
    model_folder: Path, triples: Path, tmp_path: Path
) -> None:
    data, dropped = tmp_path / "data.jsonl", tmp_path / "dropped.json"
    long = " ".join(row["context"] for row in read_triples(triples))
    rows = [{"context": long * 9}, {"context": "the mother of Anna is Maria"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", data, "--output", tmp_path / "out", "--dropped", dropped]
    assert main(command("learn", model_folder, *options)) == 0
    reasons = [each["reason"] for each in json.loads(dropped.read_text())["dropped"]]
    assert reasons == ["context longer than 128 tokens"]
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["2"]


def write(text: str, name: str = "data.jsonl") -> Callable[[Path], list[str]]:
    def made(folder: Path) -> list[str]:
        (folder / name).write_text(text)
        return ["--text" if name.endswith(".txt") else "--data", str(folder / name)]

    return made


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (lambda _: [], "text: expected text files, or data, got neither"),
        (lambda folder: ["--text", str(folder)], "text: expected a text file, got"),
        (lambda folder: ["--data", str(folder / "none")], "expected a JSONL file of contexts"),
        (write("", "empty.txt"), "text: expected a text in"),
        (write(""), "data: expected at least one record in"),
        (write("[1]"), "line 1: expected a JSON object, got int"),
        (write('{"question": "q"}'), 'line 1: expected the field "context", got only'),
        (write('{"context": " "}'), 'line 1: expected "context" to be a non-empty string'),
        (write('{"context": "a b", "context_loss": [[0, 9]]}'), 'expected "context_loss" to be'),
        (
            lambda f: [*write("a b c", "a.txt")(f), "--max-context-tokens", "2"],
            "text: expected at least one usable text, got none of 1",
        ),
        (lambda f: [*write("a b", "a.txt")(f), "--rank", "0"], "rank: expected an integer >= 1"),
        (
            lambda f: [*write("a b", "a.txt")(f), "--for-vllm", "--inner-params", "full"],
            'inner_params: expected "linear" or "lora" with for_vllm, got "full"',
        ),
        (
            lambda f: [*write("a b", "a.txt")(f), "--form", "full", "--rank", "2"],
            'form: expected "lora" with a rank or for_vllm, got "full"',
        ),
        (lambda f: [*write("a b", "a.txt")(f), "--inner-lr", "-1"], "inner_lr: expected a finite"),
        (
            lambda f: [*write("a b", "a.txt")(f), "--inner-params", "lora"],
            "inner_params: expected to select some parameters, got none",
        ),
    ],
)
def test_bad_input_of_learn_is_one_line(
    given: Callable[[Path], list[str]],
    expected: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = command("learn", model_folder, *given(tmp_path), "--output", tmp_path / "out")
    assert main(line) == BAD_INPUT
    said = capsys.readouterr().err.strip()
    assert said.startswith("gdprompt learn: error: ") and expected in said and "\n" not in said
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_written_over(
    model_folder: Path, texts: list[Path], tmp_path: Path
) -> None:
    line = command("learn", model_folder, "--text", texts[0], "--output", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main(line) == BAD_INPUT
    assert main([*line, "--resume"]) == BAD_INPUT
    assert main([*line, "--overwrite"]) == 0
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert main([*line[:-1], str(texts[0].parent), "--overwrite"]) == BAD_INPUT  # its own input
    assert texts[0].exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--adapter", "none", "who ?"], "folder: expected one that save_pretrained wrote"),
        (["--adapter", "ADAPTER", " "], "question: expected a text, got none"),
        (["--adapter", "ADAPTER", "who " * 500], "question: expected rows of at most"),
        (
            ["--adapter", "ADAPTER", "who ?", "--text", "none"],
            "text: expected none without",
        ),
        (
            ["--adapter", "ADAPTER", "who ?", "--text", "none", "--compare"],
            "text: expected a text file, got none",
        ),
        (["--adapter", "ADAPTER", "who ?", "--answer-tokens", "0"], "answer_tokens: expected"),
        (["--adapter", "ADAPTER", "who ?", "--chat-template"], "chat_template: expected"),
    ],
)
def test_bad_input_of_ask_is_one_line(
    given: list[str],
    expected: str,
    model_folder: Path,
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    given = [each.replace("ADAPTER", str(adapter)) for each in given]
    assert main(command("ask", model_folder, *given)) == BAD_INPUT
    said = capsys.readouterr().err.strip()
    assert said.startswith("gdprompt ask: error: ") and expected in said and "\n" not in said
