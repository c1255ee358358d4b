"""Adapters of a base model as the θ' of groups, to run the model at all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from ..models.architecture import check_model, compute_dtype
from ..ops.phase import Phase
from ..update.adapted_layer import LayerChange, MaterialisedLayer, StepState, find_rule
from ..update.attach import AdaptedModel
from ..update.change import WeightChange, wide
from ..update.changed import (
    ChangedEmbedding,
    ChangedLinear,
    ChangedVocabulary,
    changed_small,
)
from ..update.linear import AdaptedLinear
from .adapter import PREFIX, WEIGHTS_FILE
from .layers import is_transposed
from .record import Learnt, learnt_in, read_record

Parts = Mapping[str, Tensor]  # of a layer in an adapter, by their names there


def load_adapters(model: nn.Module, folders: Sequence[Path]) -> tuple[AdaptedModel, list[Learnt]]:
    """The base model at the θ' of an adapter for each group, and how each was learnt.

    Raises:
        UserError: if a folder has no adapter that save_pretrained wrote, or not one of this model.
    """
    check_model(model)
    if hasattr(model, "peft_config"):
        raise UserError("model: expected the base of the adapters without any, got one with some")
    if not folders:
        raise UserError("folder: expected a folder or several, got none")
    learnt = [learnt_in(folder) for folder in folders]
    device = next(model.parameters()).device
    changes = [_changes_in(model, folder, device) for folder in folders]
    state = StepState(len(folders), 0.0, Phase(second_order=False), compute_dtype(model))
    adapted = AdaptedModel(model, {}, state)
    for name in sorted({name for each in changes for name in each}):
        module = model.get_submodule(name)
        _put(adapted, name, module, [each.get(name, LayerChange()) for each in changes])
    adapted.detach(level=1)
    return adapted, learnt


def _put(adapted: AdaptedModel, name: str, module: Any, changes: Sequence[LayerChange]) -> None:
    """Puts a changed layer in the place of an adapted one."""
    state, rate = adapted.state, adapted.state.rate(name, module.weight)
    if module is adapted.head:
        adapted.vocabulary = ChangedVocabulary(module, state, rate, changes)
    elif isinstance(module, nn.Embedding):
        adapted.adapted_layers[module] = ChangedEmbedding(module, state, rate, changes)
    elif isinstance(adapted.adapted_layers.get(module), AdaptedLinear):
        adapted.adapted_layers[module] = ChangedLinear(module, state, rate, changes)
    else:
        rule = find_rule(module)
        moves = {key: True for key, _ in module.named_parameters(recurse=False)}
        layer = None if rule is None else rule(module, moves, state, rate)
        if not isinstance(layer, MaterialisedLayer):
            raise UserError(f"folder: expected an adapter of layers that are known, got {name}")
        adapted.adapted_layers[module] = changed_small(layer, changes)


def _changes_in(model: nn.Module, folder: Path, device: torch.device) -> dict[str, LayerChange]:
    """What an adapter changes, by layer."""
    if read_record(folder).get("form") != "lora":
        raise UserError(f"folder: expected an adapter, got the whole model {folder}")
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"folder: expected an adapter to load in {path}, got {error}") from None
    parts: dict[str, dict[str, Tensor]] = {}
    modules = dict(model.named_modules())
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(PREFIX).rpartition(".")
        for inside in (".lora_A", ".lora_B"):
            if name.endswith(inside):
                name, part = name.removesuffix(inside), inside[1:]
        if name not in modules:
            raise UserError(f"folder: expected an adapter of this model, got {folder} with {key}")
        parts.setdefault(name, {})[part] = tensor
    return {name: _change(folder, name, modules[name], own) for name, own in parts.items()}


def _change(folder: Path, name: str, module: Any, parts: Parts) -> LayerChange:
    """What the parts of a layer change: B A, or its parameters' new values."""
    sizes = tuple(reversed(module.weight.shape) if is_transposed(module) else module.weight.shape)
    if len(sizes) == 1:
        return LayerChange(small=dict(parts))
    change = WeightChange(*sizes)
    try:
        if "lora_A" in parts:
            change.add(parts["lora_B"].T, parts["lora_A"])
            return LayerChange(change)
        if "lora_embedding_A" in parts:
            change.add(parts["lora_embedding_A"], parts["lora_embedding_B"].T)
            return LayerChange(change)
        own = {key: wide(parts[key]) - p.detach() for key, p in module.named_parameters()}
    except (KeyError, ValueError, RuntimeError):
        shapes = {key: tuple(part.shape) for key, part in parts.items()}
        raise UserError(
            f"folder: expected parts of a layer {sizes} for {name}, got {shapes} in {folder}"
        ) from None
    change.add_dense(own["weight"].T if is_transposed(module) else own["weight"])
    return LayerChange(change, own.get("bias"))
