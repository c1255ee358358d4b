"""Training: options, resuming to the bit, whole checkpoints."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import gdprompt_fast.training.loop
from gdprompt_fast import MetaBatch, fast_meta_step, reference_meta_step
from gdprompt_fast.data import (
    Example,
    Limits,
    ShuffledSampler,
    meta_batch,
    pad,
    prompt_rows,
    query_rows,
    tokenise_triples,
    units_by_context,
)
from gdprompt_fast.data.people import make_people_data, people_tokenizer
from gdprompt_fast.loading import add_lora
from gdprompt_fast.reference.compare import gradients_of, worst_error
from gdprompt_fast.teacher import TeacherCache
from gdprompt_fast.training.finetune import fine_tuning_backward, row_loss
from gdprompt_fast.training.loop import meta_train
from gdprompt_fast.training.metrics import MetricsLog, read_metrics
from gdprompt_fast.training.options import TrainOptions
from helpers.models import small_llama

TOKENIZER = people_tokenizer()
GOLD = TrainOptions(
    steps=7, batch_size=2, outer_lr=1e-2, warmup_steps=2, inner_lr=0.3, objective="gold",
    lm_weight=0.1, checkpoint_every=3,
)  # fmt: skip
KL = dataclasses.replace(GOLD, objective="kl")
GROUPED = dataclasses.replace(
    KL, batch_size=1, contexts_per_group=2, queries_per_context=2, lm_on="prompts"
)
LORA = dataclasses.replace(KL, inner_params="lora", inner_steps=2)


def tiny_llama(seed: int = 0) -> torch.nn.Module:
    model = small_llama(
        len(TOKENIZER),
        seed,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return model.train()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    data = make_people_data(1, 5, seed=0).test  # fewer than the run draws: it goes round
    return tokenise_triples(data, TOKENIZER, Limits(64, 64, 64)).examples


class Killed(Exception):
    """Stands for the end of the process."""


def killed_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` that works ``calls`` times and then kills."""
    left = [calls]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return function(*args, **kwargs)

    return wrapped


def initial_model(lora: bool) -> torch.nn.Module:
    return add_lora(tiny_llama(), rank=2, seed=0) if lora else tiny_llama()


def run(
    options: TrainOptions,
    examples: list[Example],
    output: Path,
    lora: bool = False,
    joint: list[Example] | None = None,
) -> dict[str, torch.Tensor]:
    """A run from the same initial model; its final weights."""
    model = initial_model(lora)
    teacher = None
    if options.objective == "kl":
        teacher = TeacherCache.build(
            output / "teacher", tiny_llama(seed=1).eval(), examples, 3, batch_size=4
        )
    meta_train(model, TOKENIZER, examples, options, output, teacher, joint)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("options", "lora", "joint"),
    [(GOLD, False, 0), (KL, False, 0), (LORA, True, 0), (GROUPED, False, 3)],
    ids=["gold", "kl", "kl with LoRA inside and outside", "kl with groups and joint training"],
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
        with pytest.raises(ValueError, match="teacher: expected a TeacherCache with objective"):
            meta_train(tiny_llama(), TOKENIZER, examples, options, tmp_path, given)
    with pytest.raises(ValueError, match="teacher: expected a TeacherCache of the examples"):
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


def first_step(
    options: TrainOptions, examples: list[Example], output: Path, **changes: Any
) -> dict[str, float]:
    """The metrics of the first step with other options."""
    run(dataclasses.replace(options, steps=1, **changes), examples, output)
    return read_metrics(output / "metrics.jsonl")[0]


def test_the_next_token_loss_can_be_on_whole_prompts(
    examples: list[Example], tmp_path: Path
) -> None:
    options = dataclasses.replace(GOLD, batch_size=5, lm_weight=1.0)
    row = first_step(options, examples, tmp_path / "a", lm_on="prompts")
    expected = []
    for example in examples:
        ids = torch.tensor([example.prompt + example.response])
        with torch.no_grad():
            expected.append(float(tiny_llama()(input_ids=ids, labels=ids).loss))
    assert row["lm_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert row["outer_loss"] == pytest.approx(row["query_loss"] + row["lm_loss"])
    on_contexts = first_step(options, examples, tmp_path / "b")
    assert row["query_loss"] == on_contexts["query_loss"]
    assert row["gradient_norm"] != on_contexts["gradient_norm"]


def test_in_bfloat16_a_step_is_near_the_float32_one_and_trains_float32_weights(
    examples: list[Example], tmp_path: Path
) -> None:
    options = dataclasses.replace(GOLD, inner_lr=0.05)  # at 0.3 θ' amplifies every rounding
    exact = first_step(options, examples, tmp_path / "a")
    rounded = first_step(options, examples, tmp_path / "b", compute_dtype="bfloat16")
    for name in ("query_loss", "lm_loss", "inner_loss", "gradient_norm"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.02)
        assert rounded[name] != exact[name]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "b" / "model", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("lm_on", ["contexts", "prompts"])
def test_in_micro_batches_a_step_is_the_same(
    lm_on: str, examples: list[Example], tmp_path: Path
) -> None:
    options = dataclasses.replace(GOLD, batch_size=5, lm_weight=0.5, lm_on=lm_on)
    whole = first_step(options, examples, tmp_path / "a")
    parts = first_step(options, examples, tmp_path / "b", micro_batch=2)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5)


def about_one_context(examples: list[Example]) -> list[Example]:
    """Five examples of which the first, the second and the last ask about the same context."""
    shared = examples[0].context
    asked = [dataclasses.replace(examples[i], context=shared) for i in (0, 1, 4)]
    return [asked[0], asked[1], examples[2], examples[3], asked[2]]


@pytest.mark.parametrize("objective", ["gold", "kl"])
def test_queries_of_one_context_lose_the_same_together_as_apart(
    objective: str, examples: list[Example], tmp_path: Path
) -> None:
    options = dataclasses.replace(KL if objective == "kl" else GOLD, lm_weight=0.0)
    asked = about_one_context(examples)
    apart = first_step(options, asked, tmp_path / "a", batch_size=5)
    together = first_step(options, asked, tmp_path / "b", batch_size=3, queries_per_context=5)
    for name in ("query_loss", "gradient_norm"):
        assert together[name] == pytest.approx(apart[name], rel=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("objective", ["gold", "kl"])
def test_a_step_with_groups_has_the_gradient_of_the_reference(
    objective: str, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []

    def both(model: torch.nn.Module, batch: MetaBatch, **options: Any) -> Any:
        _, expected = gradients_of(reference_meta_step, model, batch, **options)
        out, gradients = gradients_of(fast_meta_step, model, batch, **options)
        error, name = worst_error(gradients, expected)
        assert error < 1e-3, name
        batches.append(batch)
        return out

    monkeypatch.setattr(gdprompt_fast.training.loop, "fast_meta_step", both)
    options = dataclasses.replace(KL if objective == "kl" else GOLD, contexts_per_group=2)
    asked = about_one_context(examples)
    first_step(options, asked, tmp_path, batch_size=2, queries_per_context=2)
    units = units_by_context(asked, 2)
    assert units == [[0, 1], [2], [3], [4]]
    drawn = [units[index] for index in ShuffledSampler(4, options.seed).take(4)]
    (batch,) = batches
    assert torch.equal(batch.context_ids, pad([asked[unit[0]].context for unit in drawn])[0])
    assert batch.context_group.tolist() == [0, 0, 1, 1]
    assert batch.query_group.tolist() == [n // 2 for n, unit in enumerate(drawn) for _ in unit]
    if objective == "gold":
        queries = query_rows([asked[index] for unit in drawn for index in unit])
        assert torch.equal(batch.query_ids, queries.ids)


def test_an_epoch_of_groups_draws_every_context_once(
    examples: list[Example], tmp_path: Path
) -> None:
    grouped = dict(steps=0, batch_size=1, contexts_per_group=2, queries_per_context=2)
    run(dataclasses.replace(GOLD, **grouped), about_one_context(examples), tmp_path)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_joint_training_adds_the_fine_tuning_loss_to_the_meta_gradient(
    examples: list[Example], tmp_path: Path
) -> None:
    options = dataclasses.replace(GOLD, steps=1, clip_norm=1e9, batch_size=2)
    alone = first_step(options, examples, tmp_path / "a")
    run(options, examples, tmp_path / "b", joint=examples[3:])
    together = read_metrics(tmp_path / "b" / "metrics.jsonl")[0]
    assert together["outer_loss"] == alone["outer_loss"]
    model = tiny_llama().eval()
    loss = fine_tuning_backward(model, [examples[3], examples[4]])
    assert together["joint_loss"] == pytest.approx(loss, rel=1e-5)
    meta = meta_batch([examples[i] for i in ShuffledSampler(5, options.seed).take(2)])
    fast_meta_step(model, meta, inner_lr=0.3, objective="gold", lm_weight=0.1)
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert together["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("options", [GOLD, KL], ids=["gold", "kl"])
def test_the_loss_of_prompted_responses_counts_from_its_step(
    options: TrainOptions, examples: list[Example], tmp_path: Path
) -> None:
    options = dataclasses.replace(options, steps=2, clip_norm=1e9, prompt_weight=0.7, prompt_from=1)
    with_it = run(options, examples, tmp_path / "a")
    without = run(dataclasses.replace(options, prompt_weight=0.0), examples, tmp_path / "b")
    assert any(not torch.equal(with_it[name], without[name]) for name in with_it)
    first, second = read_metrics(tmp_path / "a" / "metrics.jsonl")
    plain = read_metrics(tmp_path / "b" / "metrics.jsonl")[0]
    assert {name: first[name] for name in plain} == plain and "prompt_loss" not in first
    assert second["prompt_loss"] > 0


def test_the_loss_of_prompted_responses_is_that_of_the_teachers_answers(
    examples: list[Example], tmp_path: Path
) -> None:
    options = dataclasses.replace(KL, steps=1, clip_norm=1e9, batch_size=2, prompt_weight=0.7)
    run(options, examples, tmp_path)
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    teacher = TeacherCache.build(
        tmp_path / "teacher", tiny_llama(seed=1).eval(), examples, 3, batch_size=4
    )
    answered, targets = teacher.batch(ShuffledSampler(5, options.seed).take(2))
    model = tiny_llama().eval()
    fast_meta_step(
        model, meta_batch(answered), inner_lr=0.3, objective="kl", teacher=targets, lm_weight=0.1
    )
    loss = row_loss(model, prompt_rows(answered))
    (0.7 * loss).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert row["prompt_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_the_step_that_prompted_responses_count_from_is_one_of_the_training() -> None:
    with pytest.raises(ValueError, match=r"prompt_from: expected one of the 7 steps.*got 7"):
        dataclasses.replace(GOLD, prompt_weight=0.3, prompt_from=7)


def test_what_a_training_that_diverged_left_in_the_gradients_is_not_added_to(
    examples: list[Example], tmp_path: Path
) -> None:
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    meta_train(model, TOKENIZER, examples, dataclasses.replace(GOLD, steps=1), tmp_path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_recomputed_blocks_give_the_same_run(examples: list[Example], tmp_path: Path) -> None:
    kept = run(GOLD, examples, tmp_path / "a")
    again = run(dataclasses.replace(GOLD, recompute="block"), examples, tmp_path / "b")
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, msg=name)


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
