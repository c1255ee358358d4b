"""Parameter-free parts of a model, computed by ops that keep less for the backward passes."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ..architecture import type_name
from ..errors import UserError
from ..ops.attention import attention
from ..ops.gelu import gelu
from ..ops.rotary import rotary
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
        raise UserError("attention_mask: expected None inside a meta step")


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)

_GATED_MLPS = {
    "transformers.models.llama.modeling_llama.LlamaMLP",
    "transformers.models.mistral.modeling_mistral.MistralMLP",
    "transformers.models.qwen2.modeling_qwen2.Qwen2MLP",
    "transformers.models.qwen3.modeling_qwen3.Qwen3MLP",
}
_GELUS = {  # the form of Φ of each, with the very constants of the op
    "transformers.activations.GELUActivation": "none",
    "transformers.activations.GELUTanh": "tanh",
    "transformers.activations.NewGELUActivation": "tanh",
    "transformers.activations.AccurateGELUActivation": "tanh",
}
_ROTARY_ATTENTIONS = {
    "transformers.models.llama.modeling_llama.LlamaAttention",
    "transformers.models.mistral.modeling_mistral.MistralAttention",
    "transformers.models.qwen2.modeling_qwen2.Qwen2Attention",
    "transformers.models.qwen3.modeling_qwen3.Qwen3Attention",
    "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXAttention",
}
_ROTARY = "apply_rotary_pos_emb"  # what all of them call, from the globals of their file


def substitute_for(module: Any, dtype: torch.dtype | None) -> Callable[..., Any] | None:
    """The forward to use in place of the module's own, if there is a better one.

    Args:
        dtype: of the products under mixed precision, or None.
    """
    name = type_name(module)
    if name in _GATED_MLPS and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        return lambda x: module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    if name in _GELUS:
        return lambda x: gelu(x, _GELUS[name])
    if name in _ROTARY_ATTENTIONS:
        return _with_our_rotary(module)
    if name == "peft.tuners.lora.layer.Linear":
        return _with_small_scaling(module, dtype)
    return None


def _with_our_rotary(attention: Any) -> Callable[..., Any] | None:
    """The module's own forward, but with our rotary embedding among its globals; None where it does
    not call transformers' own.

    The globals of its file stay as they are: other models share them.
    """
    forward = type(attention).forward
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(_ROTARY)
    in_same_file = getattr(own, "__module__", None) == type(attention).__module__
    # Hugging Face's kernels package makes a module of the function, with the name of its kernel.
    if not in_same_file and getattr(own, "kernel_layer_name", None) != "rotary_pos_emb":
        return None
    copied = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTARY: rotary},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(copied, attention)


def _with_small_scaling(layer: Any, dtype: torch.dtype | None) -> Callable[..., Any] | None:
    """y = W x + B (s A x) of a PEFT layer, which itself scales B A x: a tensor as large as y, kept
    in the inner backward beside y's own cotangent. None where the layer does anything else.

    Under mixed precision the adapters read what the layer reads; otherwise in their own dtype.
    """
    if layer.disable_adapters or layer.merged or layer.lora_variant:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    adapters = [(layer.lora_A[n], layer.lora_B[n], layer.scaling[n]) for n in names]
    if any(lora_b.bias is not None for _, lora_b, _ in adapters):  # scaled too
        return None

    def forward(x: Tensor) -> Tensor:
        y = base = layer.base_layer(x)
        for lora_a, lora_b, scaling in adapters:
            own = x if dtype is not None else x.to(lora_a.weight.dtype)
            y = y + lora_b(lora_a(own) * scaling)
        return y.to(base.dtype)

    return forward
