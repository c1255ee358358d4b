"""Sizes of the models and settings whose memory is planned."""

from __future__ import annotations

from typing import Any

VOCABULARY = 512
SIZES: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=VOCABULARY,
)
BASE: dict[str, Any] = dict(batch=4, context=24, query=10, response=4, lora_rank=4)
