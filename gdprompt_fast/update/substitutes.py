"""Parameter-free parts of a model, computed by ops that keep less for the backward passes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..ops.attention import attention
from ..ops.swiglu import swiglu

ATTENTION = "gdprompt_fast"


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, scale=scale, window=sliding_window), None


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """Attention is causal in all models of the allowlist, and right padding needs no mask."""
    if attention_mask is not None:
        raise ValueError("attention_mask: expected None inside a meta step")


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)

_GATED_MLPS = {
    "transformers.models.llama.modeling_llama.LlamaMLP",
    "transformers.models.mistral.modeling_mistral.MistralMLP",
    "transformers.models.qwen2.modeling_qwen2.Qwen2MLP",
    "transformers.models.qwen3.modeling_qwen3.Qwen3MLP",
}


def substitute_for(module: Any) -> Callable[[Tensor], Tensor] | None:
    """The forward to use in place of the module's own, if there is a better one."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name in _GATED_MLPS and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        return lambda x: module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    if name == "transformers.activations.NewGELUActivation":
        return lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    return None


def adapters_keep_dtype(
    model: nn.Module, dtype: torch.dtype | None
) -> AbstractContextManager[None]:
    """Under mixed precision, keeps PEFT from widening each adapter's input to its fp32 weights: the
    adapters' sites compute in the step's dtype, and keep their inputs for the backward passes.
    """
    if dtype is None or not hasattr(model, "peft_config"):
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    return disable_input_dtype_casting(model)
