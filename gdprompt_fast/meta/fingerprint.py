"""What a model's computation depends on beside the values of its weights."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.architecture import causal_lm
from ..models.walk import modules_of, parameters_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SCALARS = (bool, int, float, str, type(None))


def fingerprint(model: nn.Module, tokens: int) -> tuple[Any, ...]:
    """Equal for two calls between which nothing of the model has changed: modules, forwards, hooks,
    flags, configurations, which parameters are trained, the modeling file's functions, autocast.

    Args:
        tokens: of the longest row; what starts only beyond some length is another computation.
    """
    inner: Any = causal_lm(model)
    modules = tuple(_module(module) for _, module in modules_of(model))
    configs = {
        id(c): c for _, m in modules_of(model) if (c := getattr(m, "config", None)) is not None
    }
    device = next(model.parameters()).device.type
    asked = inner.config._attn_implementation
    return (
        modules,
        tuple((name, p.requires_grad, p.dtype) for name, p in parameters_of(model)),
        tuple(repr(sorted(vars(config).items(), key=str)) for config in configs.values()),
        tuple(_names(value) for value in vars(sys.modules[type(inner).__module__]).values()),
        _names(ALL_ATTENTION_FUNCTIONS.get(asked, None)),
        _names(ALL_MASK_ATTENTION_FUNCTIONS.get(asked, None)),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        tuple(tokens > limit for limit in _limits(configs.values())),
    )


def _module(module: nn.Module) -> tuple[Any, ...]:
    own = vars(module)
    return (
        type(module),
        type(module).forward,
        _names(own.get("forward")),
        tuple(tuple(own[kind]) for kind in _HOOKS),  # every hook has a number of its own
        tuple((key, value) for key, value in own.items() if isinstance(value, _SCALARS)),
    )


def _names(value: Any) -> Any:
    """What stands for a function or other object, without keeping it, or a model in it, alive."""
    value = getattr(value, "__func__", value)
    try:
        return weakref.ref(value)
    except TypeError:
        return repr(value)


def _limits(configs: Any) -> Iterator[int]:
    """The lengths at which a model may begin to compute otherwise: windows and rotary tables."""
    for config in configs:
        for name in ("sliding_window", "max_position_embeddings"):
            if isinstance(limit := getattr(config, name, None), int):
                yield limit
