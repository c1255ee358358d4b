"""The largest batch, sizes, and ``gdprompt plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
)

from gdprompt_fast.cli.main import main
from gdprompt_fast.ops.blocks import abridged_loops, block_ranges
from gdprompt_fast.plan import (
    PlannedStep,
    make_plan,
    parse_memory,
    plan_table,
    predict,
)
from gdprompt_fast.plan.plan import LARGEST_BATCH, largest_batch
from gdprompt_fast.plan.prediction import Prediction
from helpers.plans import BASE, MODELS


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    def peak_at(batch: int) -> int:
        planned = PlannedStep(**{**BASE, "batch": batch})
        return predict(MODELS["llama-one-layer"], planned).peak_bytes

    memory = peak_at(13)
    peaks = {4: peak_at(4)}
    assert largest_batch(peak_at, peaks, memory) == 13
    assert largest_batch(peak_at, peaks, memory - 1) == 12
    assert peaks[12] < peaks[13] == memory


def test_a_batch_that_is_larger_than_any_looked_for_and_fits_is_the_answer() -> None:
    peaks = {LARGEST_BATCH + 1: 10}
    assert largest_batch(lambda batch: 10, peaks, memory=11) == LARGEST_BATCH + 1


def test_a_batch_of_very_many_tokens_is_planned() -> None:
    small, large = (
        predict(MODELS["llama-one-layer"], PlannedStep(batch=batch, context=512, query=32))
        for batch in (512, 1024)
    )
    grown = large.meta_step["activations"] / small.meta_step["activations"]
    assert grown == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("start", [1, 16, 1000])
@pytest.mark.parametrize("largest", [0, 1, 2, 15, 16, 17, 700, LARGEST_BATCH])
def test_the_search_finds_the_largest_batch_in_a_few_predictions(start: int, largest: int) -> None:
    asked = []

    def peak_at(batch: int) -> int:
        asked.append(batch)
        return max(100 + 7 * batch, 10 * batch)

    memory = 106 if largest == 0 else peak_at(largest)
    asked.clear()
    assert largest_batch(peak_at, {start: max(100 + 7 * start, 10 * start)}, memory) == largest
    assert len(asked) <= 12


def test_captured_steps_have_the_optimizers_temporaries_on_top() -> None:
    meta_step = {"weights": 5, "optimizer": 10, "activations": 7}
    prediction = Prediction(1, meta_step, {"weights": 5, "optimizer": 15})
    assert (prediction.peak_bytes, prediction.captured_peak_bytes) == (22, 27)


def test_abridged_loops_take_the_last_blocks() -> None:
    assert block_ranges(10, 4) == [(0, 4), (4, 8), (8, 10)]
    with abridged_loops():
        assert block_ranges(100, 7) == [(84, 91), (91, 98), (98, 100)]
        assert block_ranges(5, 7) == [(0, 5)]
    assert len(block_ranges(100, 7)) == 15


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80_000_000_000), ("1.5 GiB", 3 << 29), ("500MB", 500_000_000)]
)
def test_sizes_of_memory_are_read(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    MODELS["llama-one-layer"].save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_the_command_prints_a_plan_and_writes_its_numbers(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    options = ["--batch", "4", "--context", "24", "--query", "10", "--json", str(output)]
    assert main(["plan", "--model", str(config_file.parent), *options, "--memory", "9MB"]) == 0
    printed = capsys.readouterr().out
    numbers = json.loads(output.read_text())
    plan = make_plan(
        AutoConfig.from_pretrained(config_file), PlannedStep(batch=4, context=24, query=10)
    )
    fast = numbers["predicted"]["fast_meta_step"]
    assert fast["peak_bytes"] == plan.fast.peak_bytes == sum(fast["meta_step"].values())
    assert numbers["largest_batch"] > 4 and f"| {numbers['largest_batch']} " in printed
    assert main(["plan", "--model", str(config_file), *options]) == 0
    assert capsys.readouterr().out == plan_table(str(config_file), plan) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/config.json"], "model: expected a config.json, a folder with one or"),
        (["--batch", "0"], "batch: expected an integer >= 1, got 0"),
        (["--context", "-3"], "context: expected an integer >= 2, got -3"),
        (["--context", "9999"], "context: expected at most the model's 2048 positions, got 9999"),
        (["--response", "32"], "response: expected fewer tokens than the query's 32"),
        (["--inner", "lora"], 'inner: expected "full" or "linear" without adapters'),
        (["--lora-rank", "0"], "lora_rank: expected an integer >= 1, got 0"),
        (["--memory", "80"], "memory: expected a size in MB, GB"),
        (["--memory", "80 Gb"], "memory: expected a size in MB, GB"),
        (["--memory", "0GB"], "memory: expected a size in MB, GB"),
        (["--json", "no/such/folder/plan.json"], "json: expected a file in an existing folder"),
        (["--model", "bert.json"], "model: expected a transformers causal LM"),
        (["--model", "mamba.json"], "model: expected one that can be built, got Mamba"),
        (
            ["--model", "unknown.json"],
            "model: expected a configuration at unknown.json, got a model_",
        ),
        (["--model", "broken.json"], "model: expected JSON in broken.json"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str],
    message: str,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(config_file.parent)
    Path("bert.json").write_text('{"model_type": "bert"}')
    Path("mamba.json").write_text('{"model_type": "mamba", "hidden_size": 8, "vocab_size": 16}')
    Path("broken.json").write_text("{")
    Path("unknown.json").write_text('{"model_type": "llama9"}')
    assert main(["plan", "--model", str(config_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_file_that_cannot_be_written_is_one_clear_line(
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write anywhere
    output = tmp_path / "plan.json"
    assert main(["plan", "--model", str(config_file), "--json", str(output)]) == 2
    assert capsys.readouterr().err.endswith(
        f"error: json: expected a file that can be written, got {output}\n"
    )


@pytest.mark.parametrize(
    "fault",
    [
        {"num_attention_heads": 5},
        {"num_key_value_heads": 3},
        {"hidden_size": "64"},
        {"hidden_act": "nosuch"},
        {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
    ],
    ids=lambda fault: next(iter(fault)),
)
def test_a_faulty_configuration_is_one_clear_line(
    fault: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=64)
    config = {"model_type": "llama", "num_attention_heads": 4, **sizes, **fault}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert main(["plan", "--model", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: model: expected" in error
