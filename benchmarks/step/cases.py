"""The models and batches that the benchmarks of the whole step share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from gdprompt_fast import MetaBatch, TeacherTargets

RESPONSE_TOKENS = 4


@dataclass(frozen=True)
class Case:
    """A model and the sizes of its batch: one context and one query per example.

    Attributes:
        rank: of LoRA adapters on a frozen model; 0 trains every parameter.
        inner_params: what the inner step moves, ``"full"`` or ``"lora"``.
    """

    config: LlamaConfig = field(repr=False)
    examples: int
    context_tokens: int
    query_tokens: int
    rank: int = 0
    inner_params: str = "full"

    def shapes(self) -> dict[str, Any]:
        """The case as the columns of a row."""
        return dict(
            examples=self.examples,
            context_tokens=self.context_tokens,
            query_tokens=self.query_tokens,
            response_tokens=RESPONSE_TOKENS,
            parameters=parameters_of(self.config),
            layers=self.config.num_hidden_layers,
            hidden=self.config.hidden_size,
            vocabulary=self.config.vocab_size,
            rank=self.rank,
            inner_params=self.inner_params,
        )


def llama(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocabulary: int,
    **config: Any,
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocabulary,
        **{"max_position_embeddings": 8192, "tie_word_embeddings": True, **config},
    )


def parameters_of(config: LlamaConfig) -> int:
    """Without adapters."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


LLAMA_1B = llama(2048, 16, 32, 8, 8192, 128256)
LLAMA_8B = llama(4096, 32, 32, 8, 14336, 128256, tie_word_embeddings=False)
CASES = {
    "tiny": Case(llama(64, 2, 4, 2, 128, 256), 4, 16, 8),
    "llama-63m": Case(llama(768, 8, 12, 4, 2048, 16384), 8, 64, 16),
    "llama-1b": Case(LLAMA_1B, 16, 16, 8),
}


# The cases of the sweeps

SMALL = Case(llama(256, 4, 4, 2, 768, 8192), examples=8, context_tokens=32, query_tokens=16)
LARGE = Case(LLAMA_1B, examples=8, context_tokens=256, query_tokens=32)
TINY = Case(llama(32, 1, 2, 1, 48, 64, initializer_range=0.3), 2, 8, 6)

SMALL_SIZES = (
    llama(128, 4, 4, 2, 384, 8192),
    llama(256, 4, 4, 2, 768, 8192),
    llama(512, 4, 8, 4, 1536, 8192),
    CASES["llama-63m"].config,
)
LARGE_SIZES = (
    llama(768, 12, 12, 4, 2048, 32768),
    llama(1024, 24, 16, 8, 3072, 65536),
    LLAMA_1B,
    llama(3072, 28, 24, 8, 8192, 128256),
    llama(4096, 32, 32, 8, 14336, 128256),
)
TINY_SIZES = (TINY.config, llama(64, 1, 2, 1, 96, 64))


@dataclass(frozen=True)
class Range:
    """What the sweeps go over, in rising order."""

    base: Case
    examples: tuple[int, ...]
    context: tuple[int, ...]
    context_examples: int
    size: tuple[LlamaConfig, ...]
    rank: tuple[int, ...]


RANGES = {
    "cpu": Range(SMALL, (1, 4, 16, 64), (16, 64, 256, 1024, 4096), 2, SMALL_SIZES, (1, 8, 64)),
    "cuda": Range(
        LARGE,
        (1, 2, 4, 8, 16, 32, 64),
        (16, 64, 256, 1024, 4096),
        8,
        LARGE_SIZES,
        (1, 4, 16, 64),
    ),
    "tiny": Range(TINY, (1, 3), (4, 8), 2, TINY_SIZES, (1, 2)),
}


def points(sweep: str, over: Range) -> list[Case]:
    base = over.base
    if sweep == "examples":
        return [replace(base, examples=n) for n in over.examples]
    if sweep == "context":
        few = replace(base, examples=over.context_examples)
        return [replace(few, context_tokens=tokens) for tokens in over.context]
    if sweep == "size":
        return [replace(base, config=config) for config in over.size]
    inner_params = {"rank": "full", "rank-lora": "lora"}[sweep]
    return [replace(base, rank=rank, inner_params=inner_params) for rank in over.rank]


# Models and batches


def random_model(case: Case, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Made on the device; what it trains has gradients already, so that all steps add to them."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(case.config, dtype=dtype).eval()
    model.to(device)
    assert model.dtype == dtype
    if case.rank:
        model = with_adapters(model, case.rank)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return model


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Adapters on every linear layer but the head; B is not zero, as after some training."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model.eval()


def random_batch(case: Case, device: torch.device) -> MetaBatch:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        size = case.examples, count
        return torch.randint(case.config.vocab_size, size, generator=generator).to(device)

    context_ids, query_ids = tokens(case.context_tokens), tokens(case.query_tokens)
    response = torch.zeros_like(query_ids, dtype=torch.bool)
    response[:, -RESPONSE_TOKENS:] = True
    return MetaBatch(
        context_ids,
        torch.ones_like(context_ids, dtype=torch.bool),
        query_ids,
        torch.ones_like(response),
        response,
    )


def self_teacher(model: nn.Module, batch: MetaBatch) -> TeacherTargets:
    """The model itself with the context in its prompt; the batch has no padding."""
    ids = torch.cat([batch.context_ids, batch.query_ids], 1)
    response = torch.cat([torch.zeros_like(batch.context_mask), batch.response_mask], 1)
    return TeacherTargets.from_model(model, ids, torch.ones_like(response), response)
