"""Models and settings whose memory is planned."""

from __future__ import annotations

from typing import Any

from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    XGLMConfig,
)

VOCABULARY = 512
SIZES: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=VOCABULARY,
)
BASE: dict[str, Any] = dict(batch=4, context=24, query=10, response=4, lora_rank=4)
MODELS: dict[str, PreTrainedConfig] = {
    "llama-tied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "llama-one-layer": LlamaConfig(**{**SIZES, "num_hidden_layers": 1}),
    "llama-untied": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama-many-words": LlamaConfig(
        **{**SIZES, "vocab_size": 1 << 15, "hidden_size": 32}, tie_word_embeddings=True
    ),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "xglm": XGLMConfig(
        d_model=64, ffn_dim=160, num_layers=2, attention_heads=4, vocab_size=VOCABULARY
    ),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "gpt2": GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
    ),
}
