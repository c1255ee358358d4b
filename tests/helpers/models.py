"""Tiny models and random batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

from gdprompt_fast import MetaBatch, TeacherTargets

VOCABULARY = 67

# initializer_range is large so that second-order terms are of the size of first-order ones.
NEOX_SIZES: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=VOCABULARY,
    initializer_range=0.3,
)
SIZES = NEOX_SIZES | dict(num_key_value_heads=2)


def gpt2_config(vocabulary: int, positions: int) -> GPT2Config:
    return GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=vocabulary,
        n_positions=positions,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )


def xglm_config(vocabulary: int, **changes: Any) -> XGLMConfig:
    sizes = dict(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, init_std=0.1)
    return XGLMConfig(**{**sizes, "max_position_embeddings": 32, **changes}, vocab_size=vocabulary)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama-untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
    ),
    "llama-tied-padding-token": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, tie_word_embeddings=True, pad_token_id=0)
    ),
    "llama-untied-padding-token": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0)),
    "qwen2-biases-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen2-sliding-layers": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    ),
    "qwen3-head-norms": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "mistral-sliding-window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)),
    "gpt2-conv1d-positions": lambda: GPT2LMHeadModel(gpt2_config(VOCABULARY, positions=32)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX_SIZES)),
    "xglm": lambda: XGLMForCausalLM(xglm_config(VOCABULARY)),
    "xglm-untied": lambda: XGLMForCausalLM(xglm_config(VOCABULARY, tie_word_embeddings=False)),
}


def llama(vocabulary: int, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A seeded Llama of SIZES but for ``changes``."""
    return _seeded_llama(seed, {**SIZES, "vocab_size": vocabulary, **changes})


def small_llama(vocabulary: int, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A seeded Llama half as wide, its weights as small as transformers makes them."""
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return _seeded_llama(seed, {**sizes, "vocab_size": vocabulary, **changes})


def _seeded_llama(seed: int, config: dict[str, Any]) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def gpt2(vocabulary: int, positions: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(gpt2_config(vocabulary, positions)).eval()


def ragged(lengths: list[int], width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids [N, width] and the mask of their real lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (len(lengths), width), generator=generator)
    return ids, torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def last_tokens(mask: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The mask of the last ``counts`` real tokens of each row."""
    position = torch.arange(mask.shape[1])[None]
    lengths = mask.sum(1, keepdim=True)
    return mask & (position >= lengths - torch.tensor(counts)[:, None])


def wide_llama(hidden: int, vocabulary: int = 1024, layers: int = 4) -> LlamaForCausalLM:
    """A tied Llama whose weights are much larger than a few tokens' activations."""
    sizes = dict(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers)
    return llama(vocabulary, **sizes, initializer_range=0.02, tie_word_embeddings=True)


def random_batch(
    examples: int, context: int, query: int, response: int, vocabulary: int
) -> MetaBatch:
    context_ids = torch.randint(vocabulary, (examples, context))
    query_ids = torch.randint(vocabulary, (examples, query))
    real = torch.ones_like(query_ids, dtype=torch.bool)
    is_response = torch.arange(query) >= query - response
    return MetaBatch(
        context_ids,
        torch.ones_like(context_ids, dtype=torch.bool),
        query_ids,
        real,
        real & is_response,
    )


def self_teacher(model: LlamaForCausalLM, batch: MetaBatch) -> TeacherTargets:
    ids = torch.cat([batch.context_ids, batch.query_ids], 1)
    response = torch.cat([torch.zeros_like(batch.context_mask), batch.response_mask], 1)
    return TeacherTargets.from_model(model, ids, torch.ones_like(response), response)


def one_row(batch: MetaBatch) -> MetaBatch:
    """The first context and query."""
    return MetaBatch(*(getattr(batch, f.name)[:1] for f in dataclasses.fields(batch)[:5]))


def random_teacher(
    batch: MetaBatch, dtype: torch.dtype = torch.float64, ruled_out: slice = slice(0)
) -> TeacherTargets:
    """Confident predictions of a batch's response tokens, with some that are impossible."""
    generator = torch.Generator().manual_seed(7)
    tokens = int(batch.response_mask.sum())
    logits = 2 * torch.randn(tokens, VOCABULARY, generator=generator, dtype=dtype)
    logits[:, ruled_out] = -torch.inf
    return TeacherTargets.from_logits(logits)
