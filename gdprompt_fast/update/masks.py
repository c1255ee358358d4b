"""The engine's attention under a name of transformers' registries, and the masks that go with it.

Models whose attention is their own call it by that name; the mask is not a matrix but what it
means: causal, or causal within a window.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UserError
from ..models.architecture import causal_lm
from ..models.families import plain_attention
from ..models.intact import has_own_forward, is_shipped
from ..models.walk import modules_of
from ..ops.attention import attention

ATTENTION = "gdprompt_fast"
# What models pass along to an attention function that does not change what it computes.
_NEUTRAL = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "position_embeddings"}
)
_MASK_MAKERS = ("create_causal_mask", "create_sliding_window_causal_mask")
_PLACES = ("self_attn", "attention", "attn")  # of attention in a block


@dataclass(frozen=True)
class CausalMask:
    """A query sees the keys up to its own position: all of them, or the last ``window``."""

    window: int | None


def causal_window(mask: Any) -> int | None:
    """The window of a mask made by the model; None for all keys before a query.

    Raises:
        UserError: if the mask is anything else.
    """
    if not isinstance(mask, CausalMask):
        raise UserError(
            "model: expected attention to get the causal mask that its backbone makes, got "
            f"{type(mask).__name__}"
        )
    return mask.window


def check_attention_options(module: nn.Module, options: dict[str, Any]) -> None:
    """Nothing asks for another attention than softmax over the keys that the mask shows.

    Raises:
        UserError: naming the option.
    """
    causal = options.pop("is_causal", None)
    if not (getattr(module, "is_causal", True) and causal in (None, True)):
        raise UserError(
            f"model: expected causal attention, got is_causal=False in {type(module).__name__}"
        )
    for name, value in options.items():
        if name not in _NEUTRAL and value is not None and value is not False and value != 0.0:
            raise UserError(
                f"model: expected attention without {name}, got {name}={value!r} from "
                f"{type(module).__name__}"
            )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    # The window is the mask's: with transformers' own functions it is the mask that counts too.
    check_attention_options(module, options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, scale=scale, window=causal_window(attention_mask)), None


def _mask(
    *_: Any,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **__: Any,
) -> CausalMask:
    """Right padding needs no mask: attention is causal."""
    own = causal_mask_function
    if local_size is not None:
        own = sliding_window_causal_mask_function(local_size)
    if attention_mask is not None or not _same_function(mask_function, own):
        raise UserError(
            "model: expected attention to be causal, or causal within a sliding window, got "
            f"another mask ({getattr(mask_function, '__qualname__', mask_function)})"
        )
    return CausalMask(local_size)


def _same_function(one: Any, other: Any) -> bool:
    """Whether two functions are the same code over the same values."""
    code = getattr(one, "__code__", None)
    if code is None or code is not getattr(other, "__code__", None):
        return (isinstance(one, tuple) and _all_same(one, other)) or one == other
    cells = ([cell.cell_contents for cell in each.__closure__ or ()] for each in (one, other))
    return _all_same(*cells)


def _all_same(ones: Any, others: Any) -> bool:
    return len(ones) == len(others) and all(map(_same_function, ones, others))


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)


def engine_attention(model: nn.Module) -> bool:
    """Whether the engine's attention computes what the model's own would: every module that hands
    masks on, every function that makes or takes one, is transformers' own, and no hook sees a mask.
    """
    inner = causal_lm(model)
    file = sys.modules[type(inner).__module__]
    makers = [getattr(file, name) for name in _MASK_MAKERS if hasattr(file, name)]
    return (
        not any(_registered_by_user(inner, config) for config in _configs(inner))
        and bool(makers)  # XGLM's of transformers 5.0 makes masks in another way
        and all(is_shipped(maker, type(inner)) for maker in makers)
        and all(_is_shipped_module(module) for module in _mask_path(inner))
        and not any(map(_sees_masks, _mask_path(inner.base_model)))
    )


@contextmanager
def attention_by(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, the model's attention is the function of this name in transformers' registry.

    None stands for the model's own in a twice differentiable form: PyTorch's fused attention has no
    double backward (pytorch issue 116350), its math kernel has. What the user has registered is
    taken as it is.
    """
    inner = causal_lm(model)
    plain = plain_attention(inner.config.model_type)
    before = [(config, config._attn_implementation) for config in _configs(inner)]
    try:
        for config, own in before:
            users = _registered_by_user(inner, config)
            config._attn_implementation = name or (own if users else plain)
        with nullcontext() if name == ATTENTION else sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for config, own in before:
            config._attn_implementation = own


@contextmanager
def positions_in_order(check: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, transformers takes every row for one text, whose positions [B, T] ``check`` gets.

    It would look for texts packed into a row, and wait for what it finds.
    """
    module: Any = masking_utils
    find, module.find_packed_sequence_indices = module.find_packed_sequence_indices, check
    try:
        yield
    finally:
        module.find_packed_sequence_indices = find


def _configs(inner: nn.Module) -> list[Any]:
    """The model's configuration, and those that its modules have instead."""
    configs = (getattr(module, "config", None) for _, module in modules_of(inner))
    return list({id(config): config for config in configs if config is not None}.values())


def _registered_by_user(inner: nn.Module, config: Any) -> bool:
    """Whether the attention or mask function that ``config`` asks for is not transformers' own."""
    file, asked = sys.modules[type(inner).__module__], config._attn_implementation or "eager"
    eager = getattr(file, "eager_attention_forward", None)
    functions = (
        ALL_ATTENTION_FUNCTIONS.get(asked, eager),
        ALL_MASK_ATTENTION_FUNCTIONS.get(asked, causal_mask_function),
    )
    return not all(is_shipped(function, type(inner)) for function in functions)


def _mask_path(inner: nn.Module) -> list[nn.Module]:
    """The modules that a mask goes through: those that look like attention, and all around them."""
    attentions = [
        name
        for name, module in modules_of(inner)
        if name.rpartition(".")[2] in _PLACES or type(module).__name__.endswith("Attention")
    ]
    paths = (name.split(".")[:depth] for name in attentions for depth in range(1, 9))
    names = {".".join(path) for path in paths}
    return [module for name, module in modules_of(inner) if name in names]


def _is_shipped_module(module: nn.Module) -> bool:
    package = type(module).__module__.partition(".")[0]
    return package in ("transformers", "torch", "peft") and has_own_forward(module)


def _sees_masks(module: nn.Module) -> bool:
    """Whether a hook gets the inputs of a module of the backbone, masks among them."""
    return bool(module._forward_pre_hooks or module._forward_hooks_with_kwargs)
