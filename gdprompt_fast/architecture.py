"""What the engine knows of a transformers causal LM: its backbone, its head, and what it
refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

# Causal decoders whose logits are head(backbone(ids)), whose attention is causal (or
# sliding-window) softmax attention, and whose equality with the reference the test suite proves.
# Exactly these classes: a subclass may compute something else.
SUPPORTED_MODELS = frozenset(
    f"transformers.models.{name}"
    for name in (
        "llama.modeling_llama.LlamaForCausalLM",
        "qwen2.modeling_qwen2.Qwen2ForCausalLM",
        "qwen3.modeling_qwen3.Qwen3ForCausalLM",
        "mistral.modeling_mistral.MistralForCausalLM",
        "gpt2.modeling_gpt2.GPT2LMHeadModel",
        "gpt_neox.modeling_gpt_neox.GPTNeoXForCausalLM",
    )
)
SUPPORTED_TUNERS = frozenset({"peft.tuners.lora.model.LoraModel", "peft.tuners.lora.layer.Linear"})


def type_name(module: nn.Module) -> str:
    """``package.module.Class``."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def causal_lm(model: nn.Module) -> Any:
    """The transformers causal LM in ``model``, unwrapped from a PEFT model.

    Raises:
        ValueError: if it is none, or of an architecture the engine does not know.
    """
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if type_name(inner) not in SUPPORTED_MODELS:
        known = ", ".join(sorted(name.rpartition(".")[2] for name in SUPPORTED_MODELS))
        raise UserError(
            f"model: expected a transformers causal LM ({known}) or a PEFT LoRA model around one, "
            f"got {type_name(inner)}"
        )
    return inner


def check_adapters(model: nn.Module) -> None:
    """Other PEFT methods than plain LoRA on linear layers use the weights in other ways."""
    for name, module in model.named_modules():
        kind = type_name(module)
        if kind.startswith("peft.tuners.") and kind not in SUPPORTED_TUNERS:
            raise UserError(
                "model: expected PEFT adapters to be plain LoRA on linear layers, "
                f"got {kind} at {name}"
            )
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning:
            raise UserError(f"model: expected PEFT LoRA adapters, got {config.peft_type.value}")


def backbone_and_head(model: nn.Module) -> tuple[Any, nn.Linear]:
    """The module that turns ids into final hidden states, and the head that turns those into
    logits.
    """
    inner = causal_lm(model)
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise UserError(
            "model: expected a head of type nn.Linear without a bias or adapters, "
            f"got {type(head).__name__}"
        )
    if head._forward_hooks or head._forward_pre_hooks:
        raise UserError("model: expected no forward hooks on the head, which the losses replace")
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
            raise UserError(
                f"model: expected no active dropout, got {rate} in "
                f"{name or type(module).__name__}; "
                "call model.eval() or set the rate to 0"
            )


def check_ids(name: str, ids: Tensor, model: nn.Module) -> None:
    """Ids are in the vocabulary, and rows no longer than learned positions."""
    inner = causal_lm(model)
    vocabulary, config = len(inner.get_input_embeddings().weight), inner.config
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise UserError(f"{name}: expected token ids in [0, {vocabulary}), got [{low}, {high}]")
    if config.model_type == "gpt2" and ids.shape[1] > config.max_position_embeddings:
        raise UserError(
            f"{name}: expected at most {config.max_position_embeddings} tokens in a row, "
            f"got {ids.shape[1]}"
        )


def check_model(model: nn.Module) -> None:
    """Everything about the model itself that can make a meta step wrong.

    Raises:
        ValueError: unsupported architecture, active dropout, gradient checkpointing, autocast to
            another dtype than bfloat16.
    """
    inner = causal_lm(model)
    check_adapters(model)
    backbone_and_head(model)
    check_deterministic(model)
    if torch.is_inference_mode_enabled():
        raise UserError(
            "model: expected no torch.inference_mode around the step, got an active one"
        )
    if any(vars(module).get("gradient_checkpointing", False) for module in inner.modules()):
        raise UserError(
            "model: gradient checkpointing is on; it recomputes with the wrong weights "
            "inside a meta step. "
            "Call model.gradient_checkpointing_disable() first"
        )
    compute_dtype(inner)


def compute_dtype(model: nn.Module) -> torch.dtype | None:
    """bfloat16 under ``torch.autocast``: the step then computes in it; None for the weights' own.

    Raises:
        ValueError: under autocast to another dtype: the range of fp16 needs a scaled loss.
    """
    device = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    if dtype != torch.bfloat16:
        raise UserError(f"model: expected autocast to torch.bfloat16 or none, got {dtype}")
    return dtype
