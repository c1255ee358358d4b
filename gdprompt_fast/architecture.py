"""What the engine knows of a transformers causal LM: its backbone, its head, and what it
refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Causal decoders whose logits are head(backbone(ids)), whose attention is causal (or
# sliding-window) softmax attention, and whose equality with the reference the test suite proves.
SUPPORTED_MODEL_TYPES = frozenset({"llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox"})


def causal_lm(model: nn.Module) -> Any:
    """The transformers causal LM in ``model``, unwrapped from a PEFT model.

    Raises:
        ValueError: if it is none, or of an architecture the engine does not know.
    """
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    if model_type not in SUPPORTED_MODEL_TYPES or not hasattr(inner, "get_output_embeddings"):
        known = ", ".join(sorted(SUPPORTED_MODEL_TYPES))
        raise ValueError(
            f"model: expected a transformers causal LM (model_type one of {known}) or a PEFT "
            "model around one, "
            f"got {type(inner).__name__} with model_type {model_type!r}"
        )
    return inner


def backbone_and_head(model: nn.Module) -> tuple[Any, nn.Linear]:
    """The module that turns ids into final hidden states, and the head that turns those into
    logits.
    """
    inner = causal_lm(model)
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(f"model: expected a head of type nn.Linear without a bias, got {head}")
    return inner.base_model, head


def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Final hidden states [B, T, d] of right-padded ``ids`` [B, T].

    No attention mask is needed: attention is causal, so no real token sees the padding on its
    right.
    """
    backbone, _ = backbone_and_head(model)
    return backbone(input_ids=ids, use_cache=False).last_hidden_state


def predicting_states(hidden_BTd: Tensor, response_mask: Tensor) -> Tensor:
    """The states [R, d] that predict the response tokens, in row-major order of the mask: one
    position before.
    """
    return hidden_BTd[:, :-1][response_mask[:, 1:]]


def check_deterministic(model: nn.Module) -> None:
    """The meta-gradient of a step with dropout is not defined: the inner and outer pass would see
    other models.
    """
    for name, module in model.named_modules():
        rate = (
            module.p
            if isinstance(module, nn.Dropout)
            else getattr(module, "attention_dropout", 0.0)
        )
        if module.training and isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"model: expected no active dropout, got {rate} in "
                f"{name or type(module).__name__}; "
                "call model.eval() or set the rate to 0"
            )


def check_model(model: nn.Module) -> None:
    """Everything about the model itself that can make a meta step wrong.

    Raises:
        ValueError: unsupported architecture, active dropout, gradient checkpointing, autocast.
    """
    inner = causal_lm(model)
    backbone_and_head(model)
    check_deterministic(model)
    if any(vars(module).get("gradient_checkpointing", False) for module in inner.modules()):
        raise ValueError(
            "model: gradient checkpointing is on; it recomputes with the wrong weights "
            "inside a meta step. "
            "Call model.gradient_checkpointing_disable() first"
        )
    if torch.is_autocast_enabled(next(inner.parameters()).device.type):
        raise ValueError(
            "model: expected no autocast around the step, got an active torch.autocast"
        )
