"""Calls as CUDA graphs, and what has to be out of the way of a capture or of torch.compile."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gdprompt_fast.models.architecture import causal_lm

CAUSAL = "sdpa_causal"


def _no_mask(*_: Any, **__: Any) -> None:
    """None, which PyTorch's attention takes for causal."""


# Traced or captured, transformers makes a mask of tokens × tokens: no fast kernel takes one.
AttentionInterface.register(CAUSAL, sdpa_attention_forward)
AttentionMaskInterface.register(CAUSAL, _no_mask)


@contextmanager
def causal_attention(model: nn.Module) -> Iterator[None]:
    """Inside, a transformers model's attention is PyTorch's, causal without a mask."""
    config = causal_lm(model).config
    before = config._attn_implementation
    config._attn_implementation = CAUSAL
    try:
        yield
    finally:
        config._attn_implementation = before


def as_graph(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Replays of a call, captured after two to warm up; on a CPU the call itself.

    The call must read and write the same tensors every time, ``.grad`` among them.
    """
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()  # a collection inside might free what a capture must not
    try:
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            call()
    finally:
        gc.enable()
    return graph.replay
