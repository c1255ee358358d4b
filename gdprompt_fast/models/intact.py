"""Whether a module is what its class says: no hook in it, no other forward in the place of its own.

Where the engine computes a module's result another way, nothing that hangs on the module would run.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import UserError
from .walk import modules_of, parameters_of

_TORCH = Path(torch.__file__).parent
_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def hook_in(module: nn.Module, kinds: tuple[str, ...] = tuple(_HOOKS)) -> str | None:
    """The kind of a hook in the module; None without one."""
    return next((_HOOKS[kind] for kind in kinds if getattr(module, kind)), None)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs the forward that its class was published with."""
    return "forward" not in vars(module) and is_shipped(type(module).forward, type(module))


def is_shipped(function: Any, owner: Any) -> bool:
    """Whether a function is the one published with ``owner``, a class or function of the same
    package: it and everything that it wraps are code of that package's files, not a replacement.
    """
    if isinstance(function, nn.Module):  # its forward may be replaced at any time
        return _is_shipped.__wrapped__(function, owner)
    return _is_shipped(function, owner)


@lru_cache(maxsize=1024)
def _is_shipped(function: Any, owner: Any) -> bool:
    package = sys.modules.get(owner.__module__.partition(".")[0])
    files = getattr(package, "__file__", None)
    if files is None:  # a class of a script: whatever it runs is its own
        return True
    ours = Path(__file__).parents[1]  # the reference's norms without upcasts
    folders = tuple(str(folder) for folder in (Path(files).parent, _TORCH, ours))
    return all(_file_of(each).startswith(folders) for each in _wrapped(function))


def _wrapped(function: Any) -> list[Any]:
    """The function and what it wraps, from the outside in."""
    chain: list[Any] = []
    while function is not None and function not in chain:
        function = _of_kernels_package(function)
        chain.append(function)
        function = getattr(function, "__wrapped__", None)
    return chain


def _of_kernels_package(function: Any) -> Any:
    """Of a function that Hugging Face's kernels package has made a module of, and for which no
    kernel has been put in place, the function itself.
    """
    if not isinstance(function, nn.Module) or "forward" in vars(function):
        return function
    forward = type(function).forward
    if "/kernels/layer/" not in _file_of(forward):
        return function
    return next(iter(inspect.getclosurevars(forward).nonlocals.values()), function)


def _file_of(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return "" if code is None else str(code.co_filename)


def is_intact(module: nn.Module) -> bool:
    """Whether another way to compute the module's result leaves out nothing: the forward is its
    own, and there are no hooks.
    """
    return has_own_forward(module) and hook_in(module) is None


def check_modules(model: nn.Module) -> None:
    """What can be anywhere in a model and makes a meta step wrong.

    Raises:
        UserError: naming the module, for backward hooks, hooks of all modules, compiled modules.
    """
    for kind in _GLOBAL_HOOKS:
        if getattr(torch_modules, kind):
            raise UserError(f"model: expected no hooks of all modules, got torch's {kind}")
    for name, module in modules_of(model):
        where = f"{name or 'the model'} ({type(module).__name__})"
        if (hook := hook_in(module, ("_backward_hooks", "_backward_pre_hooks"))) is not None:
            raise UserError(
                f"model: expected no backward hooks, which see other gradients in a meta step, "
                f"got {hook} on {where}"
            )
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or type(module).__module__.startswith("torch._dynamo"):
            raise UserError(
                "model: expected modules that are not compiled, whose second derivative "
                f"torch.compile can get wrong, got {where}"
            )


def check_parameters(model: nn.Module) -> None:
    """Weights are plain tensors on one device.

    Raises:
        UserError: naming the parameter.
    """
    device: torch.device | None = None
    for name, parameter in parameters_of(model):
        if is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point():
            raise UserError(
                "model: expected weights that are plain tensors of a floating dtype, got "
                f"{type(parameter).__name__} of {parameter.dtype} at {name}"
            )
        device = device or parameter.device
        if parameter.device != device:
            raise UserError(
                f"model: expected all weights on one device, got {device} and "
                f"{parameter.device} ({name})"
            )


def check_never_run(module: nn.Module, name: str, why: str) -> None:
    """A module whose forward a meta step leaves out has nothing in it that would be lost.

    Raises:
        UserError: naming the module and what it has.
    """
    found = hook_in(module)
    if found is None and not _only_sets_precision(module):
        found = "a replaced forward"
    if found is not None:
        raise UserError(f"model: expected none on {name}, {why}, got {found}")


def _only_sets_precision(module: nn.Module) -> bool:
    own = type(module).forward
    return is_shipped(own, type(module)) and autocast_of_forward(module) is not None


@dataclass(frozen=True)
class ForwardAutocast:
    """The autocast around a forward: none, or to a dtype (None: it turns autocast off)."""

    present: bool = False
    dtype: torch.dtype | None = None


def autocast_of_forward(module: nn.Module) -> ForwardAutocast | None:
    """The autocast around the module's own forward, as ``accelerate`` and ``torch.autocast(…)`` as
    a decorator put it there; None of a forward that is another.
    """
    replaced = vars(module).get("forward")
    if replaced is None:
        return ForwardAutocast()
    own, around = type(module).forward, ForwardAutocast()
    for each in _wrapped(getattr(replaced, "__func__", replaced)):
        if own in (each, getattr(each, "__func__", None)):
            # Of a copied module the copied wrapper still calls the first one's method.
            return around if getattr(each, "__self__", module) is module else None
        if _file_of(each).endswith("torch/amp/autocast_mode.py"):
            autocast = inspect.getclosurevars(each).nonlocals["autocast_instance"]
            around = ForwardAutocast(True, autocast.fast_dtype if autocast._enabled else None)
        elif not _converts_outputs(each):
            return None
    return None


def _converts_outputs(function: Any) -> bool:
    """Whether this is accelerate's wrapper that makes outputs float32, or a part of it."""
    file = "accelerate.utils.operations"
    own_file = _file_of(function).endswith(f"{file.replace('.', '/')}.py")
    return own_file or type(function).__module__ == file
