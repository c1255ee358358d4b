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
    key = (kernel.fn, device, *_kinds(arguments), *constants.values())
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
    first = arguments[0] if arguments[0] is not None else arguments[1]
    if isinstance(first, tuple):
        first = first[0]
    return (first.base if isinstance(first, TensorDescriptor) else first).get_device()


def _is_watched() -> bool:
    """Whether somebody, a profiler perhaps, has hooks on launches."""
    hooks = knobs.runtime.launch_enter_hook
    return bool(getattr(hooks, "calls", hooks))


def _kinds(arguments: tuple[Any, ...]) -> list[Any]:
    """Equal for two lists of arguments that the same compiled kernel can take."""
    kinds: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            kinds += argument.dtype, argument.data_ptr() % 16
        elif isinstance(argument, tuple):  # sizes, or a tensor with its strides
            kinds += _kinds(argument)
        elif isinstance(argument, TensorDescriptor):
            kinds += argument.base.dtype, *argument.block_shape
        else:
            kinds.append(float if isinstance(argument, float) else argument)
    return kinds
