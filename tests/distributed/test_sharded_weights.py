"""A step on a model that FSDP2 has sharded: the gradient of the whole batch, a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gdprompt_fast import fast_meta_step
from gdprompt_fast.reference.compare import gradients_of, worst_error
from helpers.models import random_batch, random_teacher, wide_llama
from helpers.processes import in_processes
from helpers.sharding import full_gradients, own_part, peak_of, shard

Build = Callable[..., Any]
SHARDED = dict(recompute="block")


@pytest.mark.parametrize("count", [2, 3])
def test_the_gradient_is_that_of_the_whole_batch(
    count: int, tiny_model: Build, make_batch: Build
) -> None:
    """λ, KL and gold, groups, which are accumulated, several inner steps, micro-groups of which one
    process has fewer; of sizes that three processes do not divide.
    """
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("llama-tied", "grouped", dict(lm_weight=0.5, objective="gold")),
        ("llama-untied", "one-each", dict(objective="kl", micro_groups=1)),
        ("gpt2-conv1d-positions", "uneven", dict(objective="gold", inner_steps=2)),
        ("qwen2-biases-tied", "one-each", dict(objective="gold", first_order=True)),
    ]
    teachers = [
        random_teacher(make_batch(kind)) if options["objective"] == "kl" else None
        for _, kind, options in cases
    ]
    expected = []
    for (name, kind, options), teacher in zip(cases, teachers, strict=True):
        options = options | dict(teacher=teacher, inner_lr=0.1)
        expected.append(gradients_of(fast_meta_step, tiny_model(name), make_batch(kind), **options))

    def work() -> list[Any]:
        got = []
        for (name, kind, options), teacher in zip(cases, teachers, strict=True):
            model = shard(tiny_model(name))
            part = own_part(make_batch(kind), teacher=teacher, inner_lr=0.1)
            for _ in range(2 if kind == "grouped" else 1):
                out = fast_meta_step(model, **part, **options, **SHARDED)
            got.append((out.outer_loss, full_gradients(model)))
        return got

    for of_process in in_processes(count, work):
        for (_, kind, _), (loss, got), (out, once) in zip(cases, of_process, expected, strict=True):
            times = 2 if kind == "grouped" else 1
            wanted = {name: times * gradient for name, gradient in once.items()}
            assert worst_error(got, wanted)[0] < 1e-9
            torch.testing.assert_close(loss, out.outer_loss)


@pytest.mark.parametrize("count", [2, 3])
def test_a_process_holds_the_weights_of_one_block_beyond_its_shard(count: int) -> None:
    """And its gradient, with this process's part of a sum; the head, as large as a block here, is
    held as one, not beside one.
    """
    layers, vocabulary = 6, 1500
    model = wide_llama(128, vocabulary, layers)
    block = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel() * 4
    assert 0.9 * block < head < block
    batch = random_batch(count, 2, 3, 1, vocabulary)
    options = dict(objective="gold", recompute="block", verify="never")
    own = batch.select([0])[0]
    activations = peak_of(model, lambda: fast_meta_step(model, own, **options))

    def work() -> int:
        sharded = shard(wide_llama(128, vocabulary, layers))
        part = own_part(batch)
        return peak_of(sharded, lambda: fast_meta_step(sharded, **part, **options))

    for peak in in_processes(count, work):
        assert 2 * block < peak < (2.1 + 1 / count) * block + activations
        assert peak < 0.5 * layers * block


@pytest.mark.parametrize("count", [2, 3])
def test_of_a_frozen_base_only_adapters_have_gradients(
    count: int, lora_model: Build, make_batch: Build
) -> None:
    """Moved inside by full rank, or alone."""
    batch = make_batch("grouped")
    kinds = [dict(objective="gold", inner_params=inner) for inner in ("full", "lora")]
    expected = [
        gradients_of(fast_meta_step, lora_model(), batch, inner_lr=0.1, **options)[1]
        for options in kinds
    ]

    def work() -> list[Any]:
        found = []
        for options in kinds:
            model = shard(lora_model())
            fast_meta_step(model, **own_part(batch, inner_lr=0.1), **options, **SHARDED)
            found.append(full_gradients(model))
        return found

    for of_process in in_processes(count, work):
        for got, gradient in zip(of_process, expected, strict=True):
            assert worst_error(got, gradient)[0] < 1e-9
            assert all(".lora_" in name for name in got)


def test_in_bfloat16_weights_are_gathered_in_it_and_gradients_summed_in_fp32(
    make_batch: Build, tiny_model: Build
) -> None:
    batch = make_batch("one-each")
    model = tiny_model(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = gradients_of(
            fast_meta_step, model, batch, objective="gold", inner_lr=0.1, recompute="block"
        )

    def work() -> Any:
        sharded = shard(tiny_model(dtype=torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            part = own_part(batch, inner_lr=0.1)
            fast_meta_step(sharded, **part, objective="gold", **SHARDED)
        return full_gradients(sharded)

    for got in in_processes(2, work):
        assert {gradient.dtype for gradient in got.values()} == {torch.float32}
        assert worst_error(got, expected)[0] < 2e-2


def test_a_sharded_model_is_left_as_it_was(tiny_model: Build, make_batch: Build) -> None:
    """It trains as FSDP2's do afterwards; also after an error."""
    batch = make_batch("one-each")
    ids = batch.context_ids[:1, :5]
    own = tiny_model()
    own(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in own.named_parameters()}

    def work() -> Any:
        model = shard(tiny_model())
        model(input_ids=ids)  # leaves the root's weights gathered
        part = own_part(batch, inner_lr=0.1)
        fast_meta_step(model, **part, objective="gold", **SHARDED)
        with pytest.raises(ValueError, match="objective"):
            fast_meta_step(model, **part, objective="silver", **SHARDED)
        with pytest.raises(ValueError, match=r"recompute: expected .* whose weights are sharded"):
            fast_meta_step(model, **part, objective="gold")
        part["lm_batch"] = (ids, ids >= 0) if dist.get_rank() else None
        with pytest.raises(ValueError, match=r"lm_batch: expected .* 1 with one and 1 without"):
            fast_meta_step(model, **part, objective="gold", lm_weight=0.5, **SHARDED)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return full_gradients(model)

    for got in in_processes(2, work):
        assert worst_error(got, expected)[0] < 1e-9
