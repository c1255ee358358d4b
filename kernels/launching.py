"""Starts kernels that have been compiled without Triton's own look at every argument.

``kernel[grid](...)`` binds, classifies and prints all arguments into a key at every launch, which
takes most of the time of a launch, and an eager step makes some 900. Here the key holds only what
can decide which compiled kernel it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import JITFunction, knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

_compiled: dict[Any, tuple[Any, list[str]]] = {}  # and the names of the constants, in order


def run_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` where the tensors are: ``arguments`` for the
    parameters that are no constants, which come first, and ``constants`` for the others, with the
    options of a launch.
    """
    if not isinstance(kernel, JITFunction):  # Triton's interpreter
        kernel[grid](*arguments, **constants)
        return
    device = _device_of(arguments)
    if device != driver.active.get_current_device():
        with torch.cuda.device(device):
            run_kernel(kernel, grid, *arguments, **constants)
        return
    key = (kernel.fn, device, *map(_kind, arguments), *constants.values())
    found = _compiled.get(key)
    if found is None or _is_watched():
        _compiled[key] = kernel[grid](*arguments, **constants), kernel.arg_names[len(arguments) :]
        return
    compiled, names = found
    compiled.run(
        *(*grid, 1, 1)[:3],
        driver.active.get_current_stream(device),
        compiled.function,
        compiled.packed_metadata,
        *(None, None, None),  # no hook asks for metadata
        *arguments,
        *(constants[name] for name in names),
    )


def descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    """For the copy engine, of a tensor that is ``describable``, which is not asked again."""
    made: TensorDescriptor = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = t, t.shape, t.stride()
    made.block_shape, made.padding = block, "zero"
    return made


def _device_of(arguments: tuple[Any, ...]) -> int:
    first = next(argument for argument in arguments if argument is not None)
    while not isinstance(first, Tensor):  # a tensor with its strides, or a descriptor
        first = first[0] if isinstance(first, tuple) else first.base
    return first.get_device()


def _is_watched() -> bool:
    """Whether somebody, a profiler perhaps, has hooks on launches."""
    hooks = knobs.runtime.launch_enter_hook
    return bool(getattr(hooks, "calls", hooks))


def _kind(argument: Any) -> Any:
    """Equal for two arguments that the same compiled kernel can take."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, tuple(argument.block_shape)
    return float if isinstance(argument, float) else argument
