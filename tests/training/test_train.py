"""Training runs: the same bits after a kill, what is saved, metrics, schedules, options."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import gdprompt_fast.training.loop
from gdprompt_fast.data import (
    Example,
)
from gdprompt_fast.teacher import TeacherCache
from gdprompt_fast.training.loop import meta_train
from gdprompt_fast.training.metrics import MetricsLog, read_metrics
from gdprompt_fast.training.options import TrainOptions
from helpers.killing import Killed, killed_after
from helpers.training import (
    GOLD,
    GROUPED,
    KL,
    LENGTHS,
    LORA,
    TOKENIZER,
    initial_model,
    run,
    tiny_llama,
)


@pytest.mark.parametrize(
    ("options", "lora", "joint"),
    [
        (GOLD, False, 0),
        (KL, False, 0),
        (LORA, True, 0),
        (GROUPED, False, 3),
        (LENGTHS, False, 3),
    ],
    ids=["gold", "kl", "kl with LoRA inside and outside", "kl with groups and joint", "lengths"],
)
def test_a_killed_and_resumed_run_ends_with_the_same_bits(
    options: TrainOptions,
    lora: bool,
    joint: int,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if lora:
        pytest.importorskip("peft", reason="PEFT is an optional dependency")
    ordinary = examples[:joint] or None
    uninterrupted = run(options, examples, tmp_path / "a", lora, ordinary)
    untrained = initial_model(lora).state_dict()
    assert any(not torch.equal(uninterrupted[name], value) for name, value in untrained.items())
    with monkeypatch.context() as patch:
        step = killed_after(5, gdprompt_fast.training.loop.fast_meta_step)
        patch.setattr(gdprompt_fast.training.loop, "fast_meta_step", step)
        with pytest.raises(Killed):
            run(options, examples, tmp_path / "b", lora, ordinary)
    assert len(read_metrics(tmp_path / "b" / "metrics.jsonl")) == 5
    assert not (tmp_path / "b" / "model").exists()
    resumed = run(options, examples, tmp_path / "b", lora, ordinary)
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())
    files = sorted(path.name for path in (tmp_path / "a" / "model").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b" / "model").iterdir())
    for name in ["metrics.jsonl", *(f"model/{file}" for file in files)]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = run(GOLD, examples, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed_after(1, torch.save))
        with pytest.raises(Killed):
            run(GOLD, examples, tmp_path / "b")
    whole = [path.name for path in (tmp_path / "b" / "checkpoints").glob("step-*")]
    assert whole == ["step-00000003"]
    resumed = run(GOLD, examples, tmp_path / "b")
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())
    assert [path.name for path in (tmp_path / "b" / "checkpoints").iterdir()] == ["step-00000007"]


def test_a_finished_run_can_be_resumed_without_a_change(
    examples: list[Example], tmp_path: Path
) -> None:
    first = run(GOLD, examples, tmp_path)
    again = run(GOLD, examples, tmp_path)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == GOLD.steps


@pytest.mark.quick
def test_the_saved_model_is_the_trained_one(examples: list[Example], tmp_path: Path) -> None:
    weights = run(GOLD, examples, tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(weights[name], value) for name, value in loaded.state_dict().items())
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "model" / "tokenizer.json").is_file()


@pytest.mark.quick
def test_training_lowers_the_loss(examples: list[Example], tmp_path: Path) -> None:
    run(dataclasses.replace(GOLD, steps=30, lm_weight=0.0), examples, tmp_path)
    losses = [row["query_loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_metrics_have_a_row_a_step(examples: list[Example], tmp_path: Path) -> None:
    run(GOLD, examples, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, GOLD.steps + 1))
    for row in rows:
        assert row["outer_loss"] == pytest.approx(row["query_loss"] + 0.1 * row["lm_loss"])
        assert row["gradient_norm"] > 0 and row["inner_loss"] > 0


def test_a_step_that_is_not_finite_stops_training(examples: list[Example], tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.norm.weight.data[0] = torch.inf
    with pytest.raises(FloatingPointError):
        meta_train(model, TOKENIZER, examples, GOLD, tmp_path)


def test_a_teacher_goes_with_the_objective_and_the_examples(
    examples: list[Example], tmp_path: Path
) -> None:
    teacher = TeacherCache.build(
        tmp_path / "teacher", tiny_llama(seed=1).eval(), examples, 3, batch_size=4
    )
    for options, given in ((KL, None), (GOLD, teacher)):
        with pytest.raises(ValueError, match="teacher: expected a Teacher with objective"):
            meta_train(tiny_llama(), TOKENIZER, examples, options, tmp_path, given)
    with pytest.raises(ValueError, match="teacher: expected one of the examples"):
        meta_train(tiny_llama(), TOKENIZER, examples[1:], KL, tmp_path, teacher)


def test_the_learning_rate_rises_and_falls() -> None:
    options = dataclasses.replace(GOLD, steps=100, warmup_steps=10)
    rates = [options.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(options.outer_lr / 10)
    assert max(rates) == rates[9] == rates[10] == options.outer_lr
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 0.001 * options.outer_lr


def test_no_number_of_steps_is_one_epoch(examples: list[Example], tmp_path: Path) -> None:
    run(dataclasses.replace(GOLD, steps=0), examples, tmp_path)
    assert len(examples) == 5 and GOLD.batch_size == 2
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2])  # a warm-up of two steps, then the cosine


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lm_on", "queries"),
        ("steps", 8e2),
        ("prompt_weight", -0.1),
        ("prompt_from", 1.5),
        ("compute_dtype", "float16"),
        ("recompute", "all"),
        ("steps", -1),
        ("batch_size", -1),
        ("contexts_per_group", 0),
        ("queries_per_context", 0),
        ("outer_lr", 0.0),
        ("clip_norm", float("nan")),
        ("inner_lr", -0.1),
        ("inner_steps", 0),
        ("lm_weight", -1.0),
        ("checkpoint_every", 0),
    ],
)
def test_a_bad_option_is_an_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected .*, got {value!r}"):
        dataclasses.replace(GOLD, **{name: value})


def test_reopened_metrics_forget_rows_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')  # killed in the middle of a row
    log = MetricsLog(path, step=1)
    log.write({"step": 2})
    log.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_metrics_go_to_tensorboard_where_it_is_installed(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(GOLD, examples, tmp_path / "without")
    assert not (tmp_path / "without" / "tensorboard").exists()
    written: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            written.append(("flush",))

        close = flush

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = MetricsLog(tmp_path / "metrics.jsonl", step=0)
    log.write({"step": 1, "outer_loss": 0.5})
    log.close()
    MetricsLog(tmp_path / "metrics.jsonl", step=1).close()
    folder = str(tmp_path / "tensorboard")
    scalar = ("outer_loss", 0.5, 1)
    assert written == [(folder, 1), scalar, ("flush",), ("flush",), (folder, 2), ("flush",)]
