"""θ' in the place of θ where a model's state is asked for: state_dict() and save_pretrained()."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn

from ..errors import UserError
from ..models.architecture import causal_lm
from ..update.adapted_layer import AdaptedLayer
from ..update.attach import AdaptedModel
from .layers import OF_PEFT, values_at

_AT_THETA: ContextVar[bool] = ContextVar("_AT_THETA", default=False)
SEVERAL = (
    "groups: expected one group applied where the model's state is asked for, got {}: "
    "to_state_dict(group) and save_pretrained(folder, group) of the update take one of several"
)


def state_of(adapted: AdaptedModel, group: int) -> dict[str, Tensor]:
    """The model's state dict with what the inner step moves at θ' of a group, in the weights' own
    dtypes; a tied embedding and its head are one tensor.
    """
    state = own_state(adapted.model)
    values: dict[AdaptedLayer, dict[str, Tensor]] = {}
    for path, module in adapted.model.named_modules(remove_duplicate=False):
        layer = adapted.layer_of(module)
        if layer is not None and layer.moving:
            if layer not in values:
                values[layer] = values_at(module, layer.change(group))
            state |= {f"{path}.{name}": value for name, value in values[layer].items()}
    return state


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict at θ, whatever is applied to it."""
    token = _AT_THETA.set(True)
    try:
        return dict(model.state_dict())
    finally:
        _AT_THETA.reset(token)


@contextmanager
def state_at(adapted: AdaptedModel, groups: list[int], save: Callable[..., Any]) -> Iterator[None]:
    """Inside, the model's ``state_dict`` and ``save_pretrained`` are of θ' of the one group; with
    several they raise.

    Args:
        groups: that are applied.
        save: writes θ' of the one as an adapter to a folder: where the base moves beside adapters,
            for which ``save_pretrained`` would write these alone.
    """
    with ExitStack() as stack:
        if len(groups) > 1:
            stack.enter_context(refused(adapted.model, UserError(SEVERAL.format(groups))))
        else:
            stack.enter_context(_states(adapted, groups[0]))
            if hasattr(adapted.model, "peft_config") and _moves_base(adapted):
                stack.enter_context(_saved_by(_savers(adapted.model), save))
        yield


@contextmanager
def _states(adapted: AdaptedModel, group: int) -> Iterator[None]:
    """Inside, every moved layer's part of a state dict is at θ'."""
    made: WeakValueDictionary[tuple[AdaptedLayer, str], Tensor] = WeakValueDictionary()

    def put(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if _AT_THETA.get():
            return
        layer = adapted.layer_of(module)
        assert layer is not None
        names = [name for name, _ in module.named_parameters(recurse=False)]
        known = {name: made[layer, name] for name in names if (layer, name) in made}
        values = known if len(known) == len(names) else values_at(module, layer.change(group))
        for name, value in values.items():
            made[layer, name] = state[f"{prefix}{name}"] = value

    with ExitStack() as stack:
        for module in adapted.model.modules():
            layer = adapted.layer_of(module)
            if layer is not None and layer.moving:
                stack.callback(module.register_state_dict_post_hook(put).remove)
        yield


@contextmanager
def refused(model: Any, error: UserError) -> Iterator[None]:
    """Inside, the state of the model and of its parts is refused."""

    def refuse(*_: Any, **__: Any) -> None:
        if not _AT_THETA.get():
            raise error

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_state_dict_pre_hook(refuse).remove)
        stack.enter_context(_saved_by(_savers(model), refuse))
        yield


@contextmanager
def _saved_by(modules: list[Any], save: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``save_pretrained`` of the modules is ``save``."""
    try:
        for module in modules:
            module.save_pretrained = save
        yield
    finally:
        for module in modules:
            vars(module).pop("save_pretrained", None)


def _savers(model: Any) -> list[Any]:
    """The modules that users save: the causal LM and what is around it."""
    return list({id(each): each for each in (model, causal_lm(model))}.values())


def _moves_base(adapted: AdaptedModel) -> bool:
    return any(
        layer.moving
        for name, module in adapted.model.named_modules()
        if (layer := adapted.layer_of(module)) is not None and not OF_PEFT.search(name)
    )
