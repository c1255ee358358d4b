"""What the engine asks of a transformers causal LM: its backbone, its head, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..errors import UserError
from .families import FAMILIES, SCALED_EMBEDDINGS, family_of, type_name
from .intact import autocast_of_forward, check_modules, check_never_run, check_parameters, is_intact
from .walk import modules_of

SUPPORTED_TUNERS = frozenset({"peft.tuners.lora.model.LoraModel", "peft.tuners.lora.layer.Linear"})
_RATES = ("dropout", "attention_dropout", "activation_dropout", "layerdrop")
# What a LoraConfig may set: the rest changes what an adapter computes, or may in a later PEFT.
LORA_OPTIONS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "lora_bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("ensure_weight_tying", "megatron_core", "qalora_group_size"),
}


def causal_lm(model: nn.Module) -> Any:
    """The transformers causal LM in ``model``, unwrapped from a PEFT model.

    Raises:
        UserError: if it is none, or of an architecture the engine does not know.
    """
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if family_of(inner) is None:
        known = ", ".join(sorted(family.causal_lm for family in FAMILIES))
        raise UserError(
            f"model: expected a transformers causal LM ({known}) or a PEFT LoRA model around one, "
            f"got {type_name(inner)}"
        )
    return inner


def check_adapters(model: nn.Module) -> None:
    """Adapters are plain LoRA on linear layers, in use, and not written into the weights.

    Raises:
        UserError: naming the adapter, layer or option that is something else.
    """
    for name, module in modules_of(model):
        kind = type_name(module)
        if kind.startswith("peft.tuners.") and kind not in SUPPORTED_TUNERS:
            raise UserError(
                "model: expected PEFT adapters to be plain LoRA on linear layers, "
                f"got {kind} at {name}"
            )
        if hasattr(module, "lora_A"):
            _check_lora_layer(name, module)
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise UserError(f"model: expected PEFT LoRA adapters, got {config.peft_type.value}")
        _check_lora_options(name, config)


def _check_lora_layer(name: str, layer: Any) -> None:
    if layer.merged:
        raise UserError(
            f"model: expected adapters beside the weights, got some merged into those of {name}; "
            "call model.unmerge_adapter() first"
        )
    trained = any(p.requires_grad for key, p in layer.named_parameters() if "lora_" in key)
    if layer.disable_adapters and trained:
        raise UserError(
            f"model: expected adapters that are trained to be in use, got {name} with disabled ones"
        )
    variants = getattr(layer, "lora_variant", {})
    for adapter in layer.active_adapters:
        if adapter in variants:
            raise UserError(
                "model: expected PEFT adapters to be plain LoRA on linear layers, got "
                f"{type(variants[adapter]).__name__} at {name}"
            )


def _check_lora_options(adapter: str, config: Any) -> None:
    default = type(config)()
    for option in fields(config):
        value = getattr(config, option.name)
        if option.name not in LORA_OPTIONS and value != getattr(default, option.name):
            raise UserError(
                f"model: expected PEFT adapters to be plain LoRA on linear layers, got adapter "
                f"{adapter!r} with "
                f"{option.name}={value!r}"
            )


def backbone_and_head(model: nn.Module) -> tuple[Any, nn.Linear]:
    """The module that turns ids into final hidden states, and the head that turns those into
    logits.

    Raises:
        UserError: if the model makes its logits in another way, or its head has adapters.
    """
    inner = causal_lm(model)
    for name, module in _wrappers(model, inner):
        check_never_run(module, name, "whose forward the losses replace")
    tokens, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise UserError(
            "model: expected a head of type nn.Linear without a bias, adapters or "
            f"modules_to_save, got {type(head).__name__}"
        )
    if not is_intact(head):
        check_never_run(head, "the head", "which the losses replace")
    if type(tokens) is not nn.Embedding and type_name(tokens) not in SCALED_EMBEDDINGS:
        raise UserError(
            "model: expected token embeddings of type nn.Embedding without adapters or "
            f"modules_to_save, got {type(tokens).__name__}"
        )
    for part, module in (("head", head), ("token embeddings", tokens)):
        if not isinstance(module.weight, nn.Parameter):
            raise UserError(
                f"model: expected the weight of the {part} to be a parameter, got a tensor "
                "computed from others"
            )
    return inner.base_model, head


def _wrappers(model: nn.Module, inner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules around the backbone, which a step does not call: the causal LM, PEFT's."""
    yield type(inner).__name__, inner
    for module in (model, getattr(model, "base_model", None)):
        if isinstance(module, nn.Module) and type_name(module).startswith("peft."):
            yield type(module).__name__, module


def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Final hidden states [B, T, d] of right-padded ``ids`` [B, T].

    No attention mask is needed: attention is causal, so no real token sees the padding on its
    right.
    """
    backbone, _ = backbone_and_head(model)
    torch.clear_autocast_cache()  # held open, it would go on with the weights before an update
    return backbone(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state


def predicting_states(hidden_BTd: Tensor, response_mask: Tensor) -> Tensor:
    """The states [R, d] that predict the response tokens, in row-major order of the mask: one
    position before.
    """
    return hidden_BTd[:, :-1][response_mask[:, 1:]]


def check_deterministic(model: nn.Module) -> None:
    """The meta-gradient of a step with dropout is not defined: the inner and outer pass would see
    other models.
    """
    for name, module in modules_of(model):
        for rate in _dropout_rates(module) if module.training else ():
            if isinstance(rate, float | int) and rate > 0:
                raise UserError(
                    f"model: expected no active dropout, got {rate} in "
                    f"{name or type(module).__name__}; "
                    "call model.eval() or set the rate to 0"
                )


def _dropout_rates(module: nn.Module) -> list[Any]:
    """Of a dropout layer, or of a module that calls the function."""
    if isinstance(module, _DropoutNd):
        return [module.p]
    return [vars(module).get(name) for name in _RATES]


def check_ids(name: str, ids: Tensor, model: nn.Module) -> None:
    """Ids [B, T] are in the vocabulary, and rows no longer than learned positions."""
    check_id_range(name, (int(ids.min()), int(ids.max())), ids.shape[1], model)


def check_id_range(name: str, between: tuple[int, int], width: int, model: nn.Module) -> None:
    """:func:`check_ids` of ids whose lowest and highest are known."""
    inner = causal_lm(model)
    vocabulary, config = len(inner.get_input_embeddings().weight), inner.config
    low, high = between
    if low < 0 or high >= vocabulary:
        raise UserError(f"{name}: expected token ids in [0, {vocabulary}), got [{low}, {high}]")
    family = family_of(inner)
    learned = family is not None and family.learned_positions
    if learned and width > config.max_position_embeddings:
        raise UserError(
            f"{name}: expected at most {config.max_position_embeddings} tokens in a row, "
            f"got {width}"
        )


def check_row_lengths(name: str, mask: Tensor, model: nn.Module) -> None:
    """Rotary tables that depend on the length of a row do so on the longest of a padded batch.

    Args:
        mask: [B, T], on the host where a step is not to wait.

    Raises:
        UserError: for padding beside rows long enough for that.
    """
    config = causal_lm(model).config
    rope = getattr(config, "rope_parameters", None) or {}
    limits = {
        "dynamic": config.max_position_embeddings,
        "longrope": rope.get("original_max_position_embeddings", config.max_position_embeddings),
    }
    kind = rope.get("rope_type")
    if kind in limits and mask.shape[1] > limits[kind] and not mask.all():
        raise UserError(
            f"{name}: expected rows of one length beyond {limits[kind]} tokens, from where rotary "
            f"embeddings of type {kind!r} depend on it, got padding"
        )


def check_model(model: nn.Module) -> None:
    """Everything about the model itself that can make a meta step wrong.

    Raises:
        UserError: unsupported architecture, hooks or forwards that a step would not run, adapters
            other than plain LoRA, active dropout, gradient checkpointing, autocast to another
            dtype than bfloat16.
    """
    causal_lm(model)
    check_modules(model)
    check_parameters(model)
    check_adapters(model)
    backbone_and_head(model)
    check_deterministic(model)
    if torch.is_inference_mode_enabled():
        raise UserError(
            "model: expected no torch.inference_mode around the step, got an active one"
        )
    if any(vars(module).get("gradient_checkpointing", False) for _, module in modules_of(model)):
        raise UserError(
            "model: gradient checkpointing is on; it recomputes with the wrong weights "
            "inside a meta step. "
            "Call model.gradient_checkpointing_disable() first"
        )
    compute_dtype(model)


def compute_dtype(model: nn.Module) -> torch.dtype | None:
    """bfloat16 under ``torch.autocast``, around the step or the model's forward (as accelerate
    prepares a model): the step then computes in it; None for the weights' own.

    Raises:
        UserError: under autocast to another dtype: the range of fp16 needs a scaled loss.
    """
    device = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    inner = causal_lm(model)
    for module in (model, inner):
        around = autocast_of_forward(module)
        if around is not None and around.present:
            dtype = around.dtype
    if dtype not in (None, torch.bfloat16):
        raise UserError(f"model: expected autocast to torch.bfloat16 or none, got {dtype}")
    return dtype
