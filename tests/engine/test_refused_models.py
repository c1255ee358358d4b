"""Models that the step cannot take: an error that says what, before anything is computed."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gdprompt_fast.errors import UserError
from gdprompt_fast.meta import step
from helpers import tampering

Build = Callable[..., Any]


def disabled(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module._disable_adapters = True


def quantised(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


def elsewhere(model: Any) -> None:
    model.model.layers[0].mlp.to("meta")


def active_dropout(model: Any) -> None:
    layer = model.model.layers[0]
    layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, nn.Dropout(0.5)).train()


def by_tamper(tamper: tampering.Tamper) -> Callable[[Any], Any]:
    return lambda model: tamper(model, random.Random(0))


def custom_op(model: Any) -> None:
    @torch.library.custom_op("gdprompt_fast_tests::halve", mutates_args=())
    def halve(x: Tensor) -> Tensor:
        return x / 2

    halve.register_autograd(lambda ctx, dy: dy / 2, setup_context=lambda *_, **__: None)
    model.model.layers[1].register_forward_hook(lambda _, __, output: halve(output))


def checkpointed(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = functools.partial(checkpoint, mlp.forward, use_reentrant=False)


def autocast_inside(model: Any) -> None:
    mlp = model.float().model.layers[0].mlp
    mlp.forward = torch.autocast("cpu", torch.bfloat16)(mlp.forward)


def skips_at_random(model: Any) -> None:
    own = model.model.layers[0].mlp
    own.register_forward_hook(lambda _, __, y: 0 * y if random.random() < 0.01 else y)


def mixes_rows(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(lambda _, __, y: y - y.mean(0, keepdim=True))


def changes_its_input(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj  # gate_proj has read the same
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].mul_(1.1),))


def attention_of_one_layer(model: Any) -> None:
    def without_queries(module: Any, query: Tensor, *arguments: Any, **options: Any) -> Any:
        return sdpa_attention_forward(module, query.detach(), *arguments, **options)

    AttentionInterface.register("without_queries", without_queries)
    attention = model.model.layers[0].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "without_queries"


def copied_with_its_wrapper(model: Any) -> None:
    copied = copy.deepcopy(model)
    model.forward = torch.autocast("cpu", torch.bfloat16)(copied.forward)


def other_silu(model: Any) -> Callable[[], None]:
    own = nn.functional.silu
    nn.functional.silu = lambda x, inplace=False: 1.1 * own(x)
    return lambda: setattr(nn.functional, "silu", own)


# name of a model, what is planted in it, and what the refusal says
REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a hook on the head": (
        "llama-untied",
        lambda m: m.lm_head.register_forward_hook(lambda *_: None),
        "a forward hook",
    ),
    "a hook on the causal LM": (
        "llama-tied",
        lambda m: m.register_forward_hook(lambda *_: None),
        "LlamaForCausalLM.*a forward hook",
    ),
    "a pre-hook on the causal LM": (
        "llama-tied",
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        "a forward pre-hook",
    ),
    "another forward of the causal LM": (
        "llama-tied",
        lambda m: setattr(m, "forward", lambda *args, **kwargs: None),
        "a replaced forward",
    ),
    "another forward of a layer": (
        "llama-tied",
        lambda m: setattr(m.model.layers[0].mlp.up_proj, "forward", lambda x: x),
        r"own forward of model.layers.0.mlp.up_proj",
    ),
    "a backward hook": ("llama-tied", by_tamper(tampering.backward_hook), "no backward hooks"),
    "an autograd Function without a graph": (
        "llama-tied",
        by_tamper(tampering.opaque_function),
        "_Opaque",
    ),
    "a custom op": ("llama-tied", custom_op, "twice differentiable, got"),
    "a compiled layer": ("llama-tied", by_tamper(tampering.compiled_layer), "not compiled"),
    "a gradient cut off": (
        "llama-tied",
        by_tamper(tampering.detaching_hook),
        "something cuts it off",
    ),
    "a weight read by a hook": (
        "llama-tied",
        by_tamper(tampering.hook_that_reads_a_weight),
        "read elsewhere",
    ),
    "a layer in two places": (
        "llama-tied",
        by_tamper(tampering.shared_module),
        "used twice|shared by",
    ),
    "a weight in two layers": ("llama-tied", by_tamper(tampering.shared_weight), "shared by"),
    "attention that is not causal": (
        "llama-tied",
        lambda m: setattr(m.model.layers[0].self_attn, "is_causal", False),
        "is_causal=False",
    ),
    "integer weights": ("llama-tied", quantised, "plain tensors of a floating dtype"),
    "weights on another device": ("llama-tied", elsewhere, "all weights on one device"),
    "active dropout": ("llama-tied", active_dropout, "no active dropout"),
    "an activation checkpoint": ("llama-tied", checkpointed, "no activation checkpoints"),
    "an autocast inside": ("llama-tied", autocast_inside, "an autocast to be around"),
    "something random": ("llama-tied", skips_at_random, "nothing random"),
    "rows that mix": ("llama-tied", mixes_rows, "what its own forward computes"),
    "an input changed in place": ("llama-tied", changes_its_input, "leave their inputs"),
    "an attention of one layer": ("llama-tied", attention_of_one_layer, "something cuts it off"),
    "a forward of another model": ("llama-tied", copied_with_its_wrapper, "a replaced forward"),
    "another silu of PyTorch": ("llama-tied", other_silu, "what its own forward computes"),
    "nothing to train": ("llama-tied", lambda m: m.requires_grad_(False) and None, "requires_grad"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_fault_in_a_model_is_refused(fault: str, tiny_model: Build, make_batch: Build) -> None:
    name, plant, message = REFUSED[fault]
    model = tiny_model(name)
    undo = plant(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        with pytest.raises(UserError, match=message):
            step.fast_meta_step(model, make_batch(), objective="gold", inner_lr=0.1)
        assert all(p.grad is None for p in model.parameters())
        after = model.state_dict().items()
        assert all(torch.equal(value, before[key]) for key, value in after if not value.is_meta)
    finally:
        if callable(undo):
            undo()


ADAPTERS: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "merged": ({}, lambda m: m.merge_adapter(), "merged into"),
    "disabled": ({}, disabled, "disabled"),
    "DoRA": ({"use_dora": True}, lambda m: None, "plain LoRA"),
    "on the head": ({"modules_to_save": ["lm_head"]}, lambda m: None, "modules_to_save"),
    "on the embedding": ({"modules_to_save": ["embed_tokens"]}, lambda m: None, "modules_to_save"),
    "layers replicated": ({"layer_replication": [[0, 2], [1, 2]]}, lambda m: None, "plain LoRA"),
}


@pytest.mark.parametrize("fault", ADAPTERS)
def test_adapters_that_are_not_plain_lora_in_use_are_refused(
    fault: str, lora_model: Build, make_batch: Build
) -> None:
    options, plant, message = ADAPTERS[fault]
    model = lora_model("llama-untied", **options)
    plant(model)
    with pytest.raises(UserError, match=message):
        step.fast_meta_step(model, make_batch(), objective="gold", inner_lr=0.1)
    assert all(p.grad is None for p in model.parameters())
