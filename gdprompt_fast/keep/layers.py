"""θ' of one group beside the fresh base model: what each of its layers gained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.architecture import causal_lm
from ..models.families import type_name
from ..update.adapted_layer import AdaptedLayer, LayerChange, MaterialisedLayer
from ..update.attach import AdaptedModel
from ..update.change import WeightChange

# What PEFT puts into the names of a base model's layers, and layers that are PEFT's own.
WRAPPERS = re.compile(r"\.base_layer$|\.modules_to_save\.[^.]+")
OF_PEFT = re.compile(r"\.lora_(A|B|embedding_A|embedding_B)(\.|$)|\.original_module(\.|$)")


@dataclass
class ChangedLayer:
    """A layer of the base model that θ' differs in.

    Attributes:
        name: in the base model without adapters.
        module: the layer.
        change: θ' − θ, the trained adapters on the layer included.
        copied: it is a copy that PEFT trains in the layer's place (modules_to_save).
    """

    name: str
    module: Any
    change: LayerChange
    copied: bool

    @property
    def transposed(self) -> bool:
        """Whether its weight is stored as [I, O]."""
        return is_transposed(self.module)

    def values(self) -> dict[str, Tensor]:
        """All parameters of the layer at θ', in their own dtypes and as they are stored."""
        return values_at(self.module, self.change)


def values_at(module: Any, change: LayerChange) -> dict[str, Tensor]:
    """All parameters of a layer after a change, in their own dtypes and as they are stored."""
    own = {name: parameter.detach() for name, parameter in module.named_parameters()}
    if change.weight is not None:
        weight = own["weight"]
        if is_transposed(module):
            own["weight"] = change.weight.add_to(weight.T).T.contiguous()
        else:
            own["weight"] = change.weight.add_to(weight)
    if change.bias is not None:
        own["bias"] = (own["bias"] + change.bias).to(own["bias"].dtype)
    return own | {name: small.to(own[name].dtype) for name, small in change.small.items()}


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight as [I, O]."""
    return type_name(module) == "transformers.pytorch_utils.Conv1D"


def changed_layers(adapted: AdaptedModel, group: int) -> Iterator[ChangedLayer]:
    """The layers that θ' of a group changes, each once by its name in the base model; a tied
    embedding and its head are two with one change.

    Raises:
        UserError: naming an adapter whose bias its layer has no place for.
        FloatingPointError: naming a layer whose θ' is not finite.
    """
    base = causal_lm(adapted.model)
    changes: dict[AdaptedLayer, LayerChange] = {}
    for path, module in base.named_modules():
        if OF_PEFT.search(path) or not any(True for _ in module.parameters(recurse=False)):
            continue
        layer = adapted.layer_of(module)
        change = LayerChange()
        if layer is not None and layer.moving:
            change = changes[layer] if layer in changes else layer.change(group)
            changes[layer] = change
        name, copied = WRAPPERS.sub("", path), ".modules_to_save." in path
        if path.endswith(".base_layer"):
            lora = base.get_submodule(path.removesuffix(".base_layer"))
            change = _with_adapters(adapted, group, name, lora, change)
        if not _is_finite(change):
            raise FloatingPointError(
                f"inner_lr: expected a rate at which θ' is finite, got one at which {name} is not"
            )
        if copied or change.small or change.bias is not None or _moved(change.weight):
            yield ChangedLayer(name, module, change, copied)


def _is_finite(change: LayerChange) -> bool:
    others = [*change.small.values(), *([] if change.bias is None else [change.bias])]
    finite = change.weight is None or change.weight.finite
    return finite and all(bool(each.isfinite().all()) for each in others)


def _moved(weight: WeightChange | None) -> bool:
    return weight is not None and weight.rank > 0


@torch.no_grad()
def _with_adapters(
    adapted: AdaptedModel, group: int, name: str, lora: Any, change: LayerChange
) -> LayerChange:
    """ΔW + Σ s B A over the adapters in use, each at the group's own where the inner step moves
    it.
    """
    if lora.disable_adapters:
        return change
    weight, bias = change.weight, change.bias
    if weight is None:
        weight = WeightChange(lora.out_features, lora.in_features)
    for key in (key for key in lora.active_adapters if key in lora.lora_A):
        a, b, scaling = lora.lora_A[key], lora.lora_B[key], lora.scaling[key]
        b_OR, a_RI = (_own(adapted, module, "weight", group) for module in (b, a))
        weight.add(scaling * b_OR.T, a_RI)
        if b.bias is not None:
            if lora.get_base_layer().bias is None:
                raise UserError(
                    f"model: expected adapters without a bias on layers without one, got {name} "
                    "with lora_bias"
                )
            own = scaling * _own(adapted, b, "bias", group)
            bias = own if bias is None else bias + own
    return LayerChange(weight, bias, change.small)


def _own(adapted: AdaptedModel, module: Any, name: str, group: int) -> Tensor:
    """A parameter of an adapter: the group's own if the inner step moves it."""
    layer = adapted.adapted_layers.get(module)
    if isinstance(layer, MaterialisedLayer) and name in layer.names[: layer.moving]:
        return layer.moved[layer.names.index(name)][group]
    return getattr(module, name).detach()
