"""Which parameters the inner step moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import UserError
from .architecture import causal_lm
from .families import type_name
from .walk import modules_of, parameters_of

InnerParams = str | Callable[[str, nn.Parameter], bool]
INNER_PARAMS = ("full", "linear", "lora")
LINEAR_LAYERS = ("torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D")


def select_inner(model: nn.Module, inner_params: InnerParams) -> dict[str, nn.Parameter]:
    """The parameters the inner step moves, by name: ``"full"`` the base parameters (frozen ones
    too), ``"linear"`` of these the weights of linear layers but the head's, which any server of
    LoRA adapters takes an update of, ``"lora"`` the active PEFT adapters, or those for which
    ``inner_params(name, parameter)`` is true.

    Raises:
        ValueError: if the choice is unknown or selects nothing.
    """
    if callable(inner_params):
        chosen = inner_params
    elif inner_params == "linear":
        linear = _linear_weights(model)

        def chosen(name: str, _: nn.Parameter) -> bool:
            return name in linear

    elif inner_params in INNER_PARAMS:

        def chosen(name: str, _: nn.Parameter) -> bool:
            if ".lora_" in name:
                return inner_params == "lora" and _is_active(name, model)
            frozen_copy = ".original_module." in name  # of PEFT's modules_to_save; never used
            return inner_params == "full" and not frozen_copy

    else:
        raise UserError(
            'inner_params: expected "full", "linear", "lora" or a callable(name, parameter) -> '
            f"bool, got {inner_params!r}"
        )
    selected = {name: p for name, p in parameters_of(model) if chosen(name, p)}
    if not selected:
        raise UserError(
            f"inner_params: expected to select some parameters, got none with {inner_params!r}"
        )
    return selected


def _linear_weights(model: nn.Module) -> set[str]:
    """The weights of the base's linear layers but the head; not of copies that PEFT trains in a
    layer's place (modules_to_save).
    """
    head, of_peft = causal_lm(model).get_output_embeddings(), {"original_module", "modules_to_save"}
    return {
        f"{name}.weight"
        for name, module in modules_of(model)
        if type_name(module) in LINEAR_LAYERS
        and module is not head
        and ".lora_" not in name
        and not of_peft & {*name.split(".")}
    }


def _is_active(name: str, model: nn.Module) -> bool:
    """Whether a parameter ``layer.lora_A.adapter.weight`` is of an adapter that the layer uses."""
    path, _, rest = name.rpartition(".lora_")
    layer: Any = model.get_submodule(path)
    return rest.split(".")[1] in layer.active_adapters


def layers_of(model: nn.Module, inner: dict[str, nn.Parameter]) -> dict[str, str]:
    """The layer of each parameter that the inner step moves, by the parameter's name; a tied
    embedding is one with its head.
    """
    names = {id(module): name for name, module in modules_of(model)}
    lm: Any = causal_lm(model)
    head, tokens = lm.get_output_embeddings(), lm.get_input_embeddings()
    layers = {name: name.rpartition(".")[0] for name in inner}
    if tokens.weight is head.weight:
        tied = names[id(tokens)], names[id(head)]
        layers = {name: tied[1] if layer in tied else layer for name, layer in layers.items()}
    return layers
