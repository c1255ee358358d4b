"""A plan from a few layers is that of the whole model, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    XGLMConfig,
)

from gdprompt_fast.plan import PlannedStep
from gdprompt_fast.plan.layers import Run, run_layers
from gdprompt_fast.plan.prediction import run_autograd, run_step
from gdprompt_fast.plan.timeline import Timeline
from gdprompt_fast.reference.lean_maml import all_alive, sequential
from helpers.plans import BASE, SIZES, VOCABULARY


def llama(layers: int, tied: bool) -> PreTrainedConfig:
    sizes = {**SIZES, "num_hidden_layers": layers}
    return LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=tied)


SLIDING: dict[str, Any] = dict(
    **{**SIZES, "num_hidden_layers": 5},
    num_key_value_heads=2,
    use_sliding_window=True,
    sliding_window=8,
)
GPT2 = GPT2Config(
    n_embd=64, n_layer=5, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
)
# Every family, and every option on one of them at least.
CASES: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "llama tied, gold, two steps": (
        llama(6, tied=True),
        dict(inner_steps=2, objective="gold", dtype="fp32"),
    ),
    "llama untied, lora": (llama(5, tied=False), dict(outer="lora")),
    "llama, lora inside": (llama(5, tied=True), dict(outer="lora", inner="lora")),
    "llama, recomputed": (llama(5, tied=False), dict(recompute="block", optimizer="sgd")),
    "gpt2": (GPT2, {}),
    "gpt2, recomputed, lora": (GPT2, dict(recompute="block", outer="lora")),
    "xglm in bf16": (
        XGLMConfig(d_model=64, ffn_dim=160, num_layers=5, attention_heads=4, vocab_size=VOCABULARY),
        {},
    ),
    "gpt-neox": (GPTNeoXConfig(**{**SIZES, "num_hidden_layers": 5}), dict(dtype="fp32")),
    "qwen2, all layers sliding": (Qwen2Config(**SLIDING, max_window_layers=0), {}),
}


def peaks(run: Run) -> tuple[Any, ...]:
    return run.parameters, run.meta_step.at_peak(), run.optimizer_step.at_peak()


def check(run: Callable[[PreTrainedConfig], Run], config: PreTrainedConfig, whole: bool) -> None:
    layers_run = []

    def counted(few: PreTrainedConfig) -> Run:
        layers_run.append(few.num_hidden_layers)
        return run(few)

    assert peaks(run_layers(counted, config)) == peaks(run(config))
    assert (config.num_hidden_layers in layers_run) == whole, layers_run


@pytest.mark.parametrize("case", CASES)
def test_a_plan_from_a_few_layers_is_that_of_all(case: str) -> None:
    config, options = CASES[case]
    planned = PlannedStep(**{**BASE, **options})
    check(lambda few: run_step(few, planned), config, whole=False)


@pytest.mark.parametrize(
    ("step", "case"),
    [(sequential, "llama, lora inside"), (all_alive, "gpt2")],
)
def test_the_other_ways_from_a_few_layers_are_those_of_all(case: str, step: Any) -> None:
    config, options = CASES[case]
    planned = PlannedStep(**{**BASE, **options, "batch": 2})
    check(lambda few: run_autograd(few, planned, step, step is sequential), config, whole=False)


def growing(by: int) -> Callable[[PreTrainedConfig], Run]:
    """A run in which each layer allocates so much more than the one before."""

    def run(config: PreTrainedConfig) -> Run:
        sizes = (1 + by * layer for layer in range(config.num_hidden_layers))
        return Run(0, Timeline.of(("weights", size) for size in sizes), Timeline([]))

    return run


def test_a_run_that_a_layer_does_not_grow_by_the_same_is_taken_whole() -> None:
    check(growing(0), llama(6, tied=True), whole=False)
    check(growing(1), llama(6, tied=True), whole=True)


def test_a_model_of_which_some_layers_are_sliding_is_run_whole() -> None:
    check(growing(0), Qwen2Config(**SLIDING, max_window_layers=2), whole=True)
