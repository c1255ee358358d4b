"""No buffer of (examples × parameters), (tokens × vocabulary) or T × T: asserted by shape and in
bytes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from gdprompt_fast import MetaBatch, TeacherTargets, fast_meta_step, reference_meta_step
from gdprompt_fast.meta.capture import tensors_of
from gdprompt_fast.models.memory import PeakMemory, model_tensors, peak_bytes_over_model
from gdprompt_fast.ops.eager import attention
from gdprompt_fast.ops.vocabulary import block
from helpers.models import random_batch, self_teacher, wide_llama

EXAMPLES, CONTEXT, QUERY, RESPONSE, VOCABULARY, HIDDEN = 6, 24, 8, 2, 1024, 64


@pytest.fixture
def model() -> LlamaForCausalLM:
    return wide_llama(HIDDEN)


@pytest.fixture
def batch() -> MetaBatch:
    return random_batch(EXAMPLES, CONTEXT, QUERY, RESPONSE, VOCABULARY)


@pytest.fixture
def teacher(model: LlamaForCausalLM, batch: MetaBatch) -> TeacherTargets:
    return self_teacher(model, batch)


@pytest.mark.parametrize("inner_steps", [1, 2], ids=lambda s: f"{s}-steps")
def test_no_large_buffer_exists_at_any_time(
    inner_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, context, query, response, vocabulary, hidden = 6, 8, 6, 2, 4096, 128
    tokens = examples * context
    monkeypatch.setattr(block, "TILE_ELEMENTS", tokens * 64)
    model = wide_llama(hidden, vocabulary)
    batch = random_batch(examples, context, query, response, vocabulary)
    # at the gate of the MLP; two uses of a layer may be copied into one product
    widest_activation = 2 * tokens * 3 * hidden
    limits = {
        "context tokens × vocabulary": tokens * vocabulary,
        "response tokens × vocabulary": examples * response * vocabulary,
        "examples × the smallest weight": examples * (hidden // 2) * hidden,
    }
    assert widest_activation < min(limits.values()), "the limits would not be told apart"
    weights = {tuple(p.shape) for p in model.parameters()}  # their one gradient is allowed
    largest: tuple[int, tuple[int, ...]] = (0, ())

    def watch(tensor: Tensor) -> None:
        nonlocal largest
        shape = tuple(tensor.shape)
        if shape not in weights and shape[::-1] not in weights:
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            largest = max(largest, (elements, shape))

    teacher = self_teacher(model, batch)
    with PeakMemory(model_tensors(model), on_new=watch):
        fast_meta_step(model, batch, teacher=teacher, inner_steps=inner_steps)
    assert largest[0] <= widest_activation, f"a buffer of {largest[0]} elements, shape {largest[1]}"


def test_no_square_buffer_of_a_long_context_exists_at_any_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context, hidden = 192, 16
    monkeypatch.setattr(block, "TILE_ELEMENTS", context * 16)
    monkeypatch.setattr(attention, "TILE_ELEMENTS", context * 4 * 8)
    model, batch = wide_llama(hidden, 64), random_batch(1, context, 4, 1, 64)
    sizes: list[int] = []
    with PeakMemory(model_tensors(model), on_new=lambda t: sizes.append(t.numel())):
        fast_meta_step(model, batch, objective="gold")
    assert max(sizes) < context * context, f"a buffer of {max(sizes)} elements"


def test_the_step_keeps_no_buffer_of_the_size_of_a_weight_when_gradients_exist(
    model: LlamaForCausalLM, batch: MetaBatch, teacher: TeacherTargets
) -> None:
    fast_meta_step(model, batch, teacher=teacher)
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    weights |= {shape[::-1] for shape in weights}
    shapes: list[tuple[int, ...]] = []
    with PeakMemory(model_tensors(model), on_new=lambda t: shapes.append(tuple(t.shape))):
        fast_meta_step(model, batch, teacher=teacher)
    dense = [shape for shape in shapes if shape in weights]
    assert not dense, f"temporaries of the size of a weight: {dense}"


def test_the_meta_gradient_becomes_grad_without_a_copy(
    model: LlamaForCausalLM, batch: MetaBatch, teacher: TeacherTargets
) -> None:
    model.zero_grad(set_to_none=True)
    inputs = [*tensors_of(batch), teacher.hidden]
    memory = PeakMemory([*model_tensors(model), *inputs])
    before = memory.live_bytes
    with memory:
        fast_meta_step(model, batch, teacher=teacher)
    gradients = sum(p.grad.nbytes for p in model.parameters())
    assert memory.live_bytes - before == gradients, (
        "the step left something behind, or a gradient was copied"
    )


def test_memory_is_that_of_two_sets_of_activations_and_does_not_grow_with_adapted_copies(
    batch: MetaBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a tile in proportion to this small model, as the default is to a real one
    monkeypatch.setattr(block, "TILE_ELEMENTS", EXAMPLES * CONTEXT * 64)
    model = wide_llama(4 * HIDDEN)

    def ordinary() -> None:
        ids = torch.cat([batch.context_ids, batch.query_ids], 1)
        model(input_ids=ids, labels=ids).loss.backward()

    fast = peak_bytes_over_model(model, lambda: fast_meta_step(model, batch, objective="gold"))
    plain = peak_bytes_over_model(model, ordinary)
    sequential = peak_bytes_over_model(
        model, lambda: reference_meta_step(model, batch, objective="gold")
    )
    assert fast <= 1.8 * plain, f"{fast} bytes over the model, {plain} for an ordinary step"
    assert fast <= 0.75 * sequential, f"{fast} bytes, {sequential} for the sequential loop"


def test_recomputed_blocks_keep_their_input_and_factors_only(batch: MetaBatch) -> None:
    layers, width, inner = 8, 128, 384
    model = wide_llama(width, layers=layers)
    kept = {
        recompute: peak_bytes_over_model(
            model,
            lambda recompute=recompute: fast_meta_step(
                model, batch, objective="gold", recompute=recompute
            ),
        )
        for recompute in ("none", "block")
    }
    # inputs and output cotangents of q, k, v, o, gate, up, down; then what enters the block
    factors = (3 * width + inner) + (width + width + width + 2 * inner + width)
    per_token = 4 * layers * (factors + 2 * width)
    one_block = kept["none"] / layers
    assert kept["block"] <= EXAMPLES * CONTEXT * per_token + 2 * one_block
    assert kept["block"] <= 0.7 * kept["none"], kept


def test_lora_outside_needs_no_gradient_of_the_size_of_a_base_weight(batch: MetaBatch) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is an optional dependency")
    base = wide_llama(256, layers=1)
    model = peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules="all-linear")).eval()
    sizes: list[int] = []
    smallest = 256 * 128  # the projections to keys and values
    with PeakMemory(model_tensors(model), on_new=lambda t: sizes.append(t.numel())):
        fast_meta_step(model, batch, objective="gold")
    tokens = EXAMPLES * CONTEXT
    dense = {p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "lora" not in n}
    assert not [n for n in sizes if n in dense and n != tokens * 1024], (
        "a dense gradient of a frozen weight"
    )
    assert smallest in dense
