"""A model's modules and parameters, walked once for all that look at it before a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

Modules = list[tuple[str, nn.Module]]
Parameters = list[tuple[str, nn.Parameter]]

_walked: dict[int, tuple[nn.Module, Modules, Parameters]] = {}


@contextmanager
def walked(model: nn.Module) -> Iterator[None]:
    """Inside, where nobody changes the model, it is not walked again."""
    if id(model) in _walked or not isinstance(model, nn.Module):
        yield
        return
    modules = _modules(model)
    _walked[id(model)] = model, modules, _parameters(modules)
    try:
        yield
    finally:
        del _walked[id(model)]


def modules_of(model: nn.Module) -> Modules:
    """``list(model.named_modules())``."""
    known = _walked.get(id(model))
    return _modules(model) if known is None else known[1]


def parameters_of(model: nn.Module) -> Parameters:
    """``list(model.named_parameters())``."""
    known = _walked.get(id(model))
    return _parameters(_modules(model)) if known is None else known[2]


def _modules(model: nn.Module) -> Modules:
    found: Modules = []
    seen: set[int] = set()
    waiting: Modules = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        prefix = f"{name}." if name else ""
        children = module._modules.items()
        waiting += [(prefix + key, m) for key, m in reversed(children) if m is not None]
    return found


def _parameters(modules: Modules) -> Parameters:
    found: Parameters = []
    seen: set[int] = set()
    for name, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((f"{name}.{key}" if name else key, parameter))
    return found
