"""Ways in which users change a model, at random or one at a time: for each, a meta step is exact or
refused.

A tamper takes a model and a random generator, changes the model and returns how to change it back.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

Undo = Callable[[], None]
Tamper = Callable[[Any, random.Random], Undo]
NOTHING: Undo = lambda: None  # noqa: E731


def scaled(output: Any, by: float = 1.2) -> Any:
    """What a module returns, times a number."""
    if isinstance(output, Tensor):
        return output * by if output.is_floating_point() else output
    if isinstance(output, tuple):
        return (scaled(output[0], by), *output[1:])
    if hasattr(output, "last_hidden_state"):
        output.last_hidden_state = scaled(output.last_hidden_state, by)
    elif hasattr(output, "logits"):
        output.logits = scaled(output.logits, by)
    return output


def some_module(model: nn.Module, draw: random.Random) -> nn.Module:
    return draw.choice([m for m in model.modules() if not isinstance(m, nn.ModuleList)])


def decoder(model: nn.Module) -> Any:
    """The causal LM inside a PEFT model, or the model itself."""
    inside: Any = model
    return inside.get_base_model() if hasattr(model, "get_base_model") else model


def some_of_block(model: Any, draw: random.Random) -> tuple[nn.Module, str]:
    """The parent and name of an MLP, attention, norm or linear layer of a block."""
    layer = draw.choice(list(decoder(model).model.layers))
    places = [
        *((layer, name) for name in ("mlp", "self_attn", "input_layernorm")),
        *((layer.mlp, name) for name in ("gate_proj", "down_proj", "act_fn")),
        *((layer.self_attn, name) for name in ("q_proj", "o_proj")),
    ]
    return draw.choice(places)


def forward_hook(model: Any, draw: random.Random) -> Undo:
    module = some_module(model, draw)
    return module.register_forward_hook(lambda _, __, output: scaled(output)).remove


def hook_in_a_block(model: Any, draw: random.Random) -> Undo:
    module = getattr(*some_of_block(model, draw))
    return module.register_forward_hook(lambda _, __, output: scaled(output)).remove


def pre_hook(model: Any, draw: random.Random) -> Undo:
    module = getattr(*some_of_block(model, draw))

    def change(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (scaled(args[0]), *args[1:]), kwargs
        return args, {n: scaled(v) if n == "hidden_states" else v for n, v in kwargs.items()}

    return module.register_forward_pre_hook(change, with_kwargs=True).remove


def backward_hook(model: Any, draw: random.Random) -> Undo:
    module = getattr(*some_of_block(model, draw))
    change = lambda _, inputs, __: tuple(None if g is None else 2 * g for g in inputs)  # noqa: E731
    return module.register_full_backward_hook(change).remove


def global_hook(model: Any, draw: random.Random) -> Undo:
    def change(module: nn.Module, _: Any, output: Any) -> Any:
        return scaled(output) if type(module).__name__ == "SiLUActivation" else None

    return nn.modules.module.register_module_forward_hook(change).remove


def replaced_forward(model: Any, draw: random.Random) -> Undo:
    module = getattr(*some_of_block(model, draw))
    own = type(module)  # its forward at the time of a call: the truth takes norms without upcasts
    module.forward = lambda *args, **kwargs: scaled(own.forward(module, *args, **kwargs))
    return lambda: vars(module).pop("forward") and None


def _replace_forward(module: nn.Module) -> Undo:
    own = module.forward
    module.forward = lambda *args, **kwargs: scaled(own(*args, **kwargs))
    return lambda: vars(module).pop("forward") and None


def replaced_forward_of_the_backbone(model: Any, draw: random.Random) -> Undo:
    return _replace_forward(decoder(model).model)


def replaced_forward_of_the_causal_lm(model: Any, draw: random.Random) -> Undo:
    return _replace_forward(decoder(model))


class Wrapper(nn.Module):
    """A module with a learnt scale on what it returns."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.scale = nn.Parameter(torch.tensor(1.2, dtype=dtype))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.module(*args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] * self.scale, *output[1:])
        return output * self.scale


def wrapper(model: Any, draw: random.Random) -> Undo:
    parent, name = some_of_block(model, draw)
    own = getattr(parent, name)
    setattr(parent, name, Wrapper(own, next(model.parameters()).dtype))
    return lambda: setattr(parent, name, own)


def subclass(model: Any, draw: random.Random) -> Undo:
    module = getattr(*some_of_block(model, draw))
    own = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return scaled(own.forward(self, *args, **kwargs))

    module.__class__ = type(f"My{own.__name__}", (own,), {"forward": forward})
    return lambda: setattr(module, "__class__", own)


def patched_class(model: Any, draw: random.Random) -> Undo:
    cls = type(getattr(*some_of_block(model, draw)))
    if not cls.__module__.startswith("transformers.models."):
        return NOTHING
    own = cls.forward
    cls.forward = lambda self, *args, **kwargs: scaled(own(self, *args, **kwargs))
    return lambda: setattr(cls, "forward", own)


def patched_function(model: Any, draw: random.Random) -> Undo:
    file = sys.modules[type(decoder(model)).__module__]
    name = draw.choice(["apply_rotary_pos_emb", "rotate_half"])
    own = getattr(file, name)
    setattr(file, name, lambda *args, **kwargs: scaled(own(*args, **kwargs)))
    return lambda: setattr(file, name, own)


class _Opaque(torch.autograd.Function):
    """Doubles, with a backward that has no graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + 0.1 * x * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        with torch.no_grad():
            return dy * (1 + 0.2 * ctx.saved_tensors[0])


def opaque_function(model: Any, draw: random.Random) -> Undo:
    module = getattr(*some_of_block(model, draw))

    def change(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_Opaque.apply(output[0]), *output[1:])
        return _Opaque.apply(output)

    return module.register_forward_hook(change).remove


def detaching_hook(model: Any, draw: random.Random) -> Undo:
    layer = draw.choice(list(decoder(model).model.layers))
    return layer.mlp.register_forward_hook(lambda _, __, output: output.detach()).remove


def hook_that_reads_a_weight(model: Any, draw: random.Random) -> Undo:
    layer = draw.choice(list(decoder(model).model.layers))
    weight = decoder(model).model.norm.weight
    return layer.register_forward_hook(lambda _, __, output: scaled(output, 1.0) * weight).remove


def _with_sink(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * options["scaling"] + mask
    weights = F.pad(scores, (0, 1)).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("with_sink", _with_sink)
AttentionMaskInterface.register("with_sink", eager_mask)


def attention_implementation(model: Any, draw: random.Random) -> Undo:
    config = decoder(model).config
    own = config._attn_implementation
    config._attn_implementation = draw.choice(["with_sink", "sdpa"])
    return lambda: setattr(config, "_attn_implementation", own)


def flags(model: Any, draw: random.Random) -> Undo:
    layer = draw.choice(list(decoder(model).model.layers))
    module, name, value = draw.choice(
        [
            (layer.self_attn, "scaling", 0.5),
            (layer.input_layernorm, "variance_epsilon", 0.5),
            (layer.self_attn, "config", copy.deepcopy(layer.self_attn.config)),
        ]
    )
    if not hasattr(module, name):
        return NOTHING
    own = getattr(module, name)
    setattr(module, name, value)
    return lambda: setattr(module, name, own)


def not_causal(model: Any, draw: random.Random) -> Undo:
    attention = draw.choice(list(decoder(model).model.layers)).self_attn
    attention.is_causal = False
    return lambda: setattr(attention, "is_causal", True)


def tuples_from_the_backbone(model: Any, draw: random.Random) -> Undo:
    config = decoder(model).config
    config.return_dict = False
    return lambda: setattr(config, "return_dict", True)


def frozen(model: Any, draw: random.Random) -> Undo:
    trained = [p for p in model.parameters() if p.requires_grad]
    chosen = draw.sample(trained, len(trained) // 2)
    for parameter in chosen:
        parameter.requires_grad_(False)

    def undo() -> None:
        for parameter in chosen:
            parameter.requires_grad_()

    return undo


def shared_weight(model: Any, draw: random.Random) -> Undo:
    first, second = (decoder(model).model.layers[i].mlp for i in (0, -1))
    name = draw.choice(["gate_proj", "down_proj"])
    owner = getattr(second, name)
    if not hasattr(owner, "weight") or "weight" not in owner._parameters:
        return NOTHING
    own, owner.weight = owner.weight, getattr(first, name).weight
    return lambda: setattr(owner, "weight", own)


def shared_module(model: Any, draw: random.Random) -> Undo:
    first, second = (decoder(model).model.layers[i] for i in (0, -1))
    own, second.mlp = second.mlp, first.mlp
    return lambda: setattr(second, "mlp", own)


def compiled_layer(model: Any, draw: random.Random) -> Undo:
    layer = draw.choice(list(decoder(model).model.layers))
    layer.mlp.compile(backend="aot_eager")
    return lambda: setattr(layer.mlp, "_compiled_call_impl", None)


def nothing(model: Any, draw: random.Random) -> Undo:
    return NOTHING


# What a step runs as it is, but for layers that the inner step moves.
RUN: tuple[Tamper, ...] = (
    attention_implementation,
    flags,
    forward_hook,
    frozen,
    hook_in_a_block,
    nothing,
    patched_class,
    patched_function,
    pre_hook,
    replaced_forward,
    replaced_forward_of_the_backbone,
    shared_weight,
    subclass,
    wrapper,
)
# What cannot be run, or not exactly.
REFUSED: tuple[Tamper, ...] = (
    backward_hook,
    compiled_layer,
    detaching_hook,
    global_hook,
    hook_that_reads_a_weight,
    not_causal,
    opaque_function,
    replaced_forward_of_the_causal_lm,
    shared_module,
    tuples_from_the_backbone,
)
TAMPERS = (*RUN, *REFUSED)
