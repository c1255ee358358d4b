"""A step of training: precision, micro-batches, groups, joint data and prompted answers."""

from __future__ import annotations

import dataclasses
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import gdprompt_fast.training.loop
from gdprompt_fast import MetaBatch, fast_meta_step, reference_meta_step
from gdprompt_fast.data import (
    Example,
    ShuffledSampler,
    meta_batch,
    pad,
    prompt_rows,
    query_rows,
    units_by_context,
)
from gdprompt_fast.meta.parts import parts_of
from gdprompt_fast.reference.compare import gradients_of, worst_error
from gdprompt_fast.teacher import TeacherCache
from gdprompt_fast.training.finetune import fine_tuning_backward, row_loss
from gdprompt_fast.training.loop import meta_train
from gdprompt_fast.training.metrics import read_metrics
from gdprompt_fast.training.options import TrainOptions
from gdprompt_fast.training.step_data import StepData, padding_of
from helpers.training import GOLD, KL, TOKENIZER, run, tiny_llama


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
    assert parts.pop("padding") <= whole.pop("padding")  # each part is as long as its own
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
    loss = float(fine_tuning_backward(model, [examples[3], examples[4]]))
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


@pytest.mark.parametrize("lm_on", ["contexts", "prompts"])
def test_a_step_padded_for_graphs_is_the_same(lm_on: str, examples: list[Example]) -> None:
    options = dataclasses.replace(GOLD, lm_on=lm_on)
    data = StepData.of(examples, [[0], [1], [2]], teacher=None)
    losses, gradients = [], []
    for ladder in (False, True):
        arguments = data.arguments(tiny_llama(), options, ladder)
        shape = arguments["batch"].layout.shape
        model = tiny_llama().eval()
        out, of_all = gradients_of(fast_meta_step, model, **arguments, config=options.step_config)
        losses.append(out)
        gradients.append(of_all)
    assert shape == shape.rung() and shape.context_tokens > 18
    assert float(losses[0].outer_loss) == pytest.approx(float(losses[1].outer_loss), rel=1e-6)
    error, name = worst_error(*gradients)
    assert error < 1e-5, name


@pytest.mark.parametrize("micro_groups", [None, 1, 2])
@pytest.mark.parametrize("ladder", [False, True])
def test_padding_is_counted_as_it_is_computed(
    micro_groups: int | None, ladder: bool, examples: list[Example]
) -> None:
    lengths = [7, 40, 40, 3]
    long = [
        dataclasses.replace(e, context=array("i", [5] * length))
        for e, length in zip(examples[:4], lengths, strict=True)
    ]
    data = StepData.of(long, [[0], [1, 2], [3]], teacher=None)
    padded = ladder and micro_groups is None
    batch = data.arguments(tiny_llama(), GOLD, padded)["batch"]
    parts = parts_of(batch, None, micro_groups, ladder)
    computed = sum(part.batch.context_ids.numel() + part.batch.query_ids.numel() for part in parts)
    share = padding_of(batch, micro_groups, ladder)
    assert share == pytest.approx(1 - data.tokens / computed)
