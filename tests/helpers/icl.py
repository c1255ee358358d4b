"""Tiny models for in-context learning against fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from helpers.models import MODELS, VOCABULARY

# One of every way to make keys and values, of every kind of positions.
FAMILIES_OF_ICL = (
    "llama-tied",
    "llama-biases",
    "qwen3-head-norms",
    "mistral-sliding-window",
    "gpt2-conv1d-positions",
    "gpt-neox",
    "xglm",
)


def tiny(name: str, seed: int = 0) -> Any:
    """A seeded model of ``MODELS`` in fp64."""
    torch.manual_seed(seed)
    return MODELS[name]().double().eval()


@contextmanager
def with_eager_attention(model: Any) -> Iterator[None]:
    """Inside, the model computes attention by the plain formula."""
    own = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = own


def demonstrations(count: int = 3) -> list[torch.Tensor]:
    """Random texts of several lengths."""
    generator = torch.Generator().manual_seed(2)
    lengths = [7, 5, 9, 6, 8, 4, 7, 5][:count]
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
