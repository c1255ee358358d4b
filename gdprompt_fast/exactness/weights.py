"""The model's weights while it is checked: exchanged for copies, moved along directions, and put
back to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Vector = dict[str, Tensor]  # by the names of parameters; one that is not there is zero


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards, also after an exception, every parameter has the data, the ``.grad`` and the
    ``requires_grad`` it had, and every module is in its mode.

    Inside, ``.grad`` is None and nothing may write into a parameter's data; see :func:`moved` and
    :func:`copied`, which exchange it.
    """
    weights = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, *_ in weights:
            parameter.grad = None
        yield
    finally:
        for parameter, data, grad, requires_grad in weights:
            parameter.grad = None  # of another dtype, perhaps
            parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, training in modes:
            module.training = training


@contextmanager
def copied(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, the model computes with copies of its weights, in ``dtype`` if one is given, and
    whatever hooks of a gradient do to them is lost. Buffers stay, as transformers keeps rotary
    tables in fp32 whatever the weights; but what is wider than ``dtype`` would widen all.
    """
    named = dict(model.named_parameters())
    copies = {name: p.data.to(dtype or p.dtype, copy=True) for name, p in named.items()}
    with _exchanged(named, copies), _numbers_in(dtype), _no_buffer_wider(model, dtype):
        yield


@contextmanager
def _no_buffer_wider(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    wide = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if dtype == torch.float32 and buffer.dtype == torch.float64
    ]
    try:
        for module, name, buffer in wide:
            setattr(module, name, buffer.to(dtype))
        yield
    finally:
        for module, name, buffer in wide:
            setattr(module, name, buffer)


@contextmanager
def _numbers_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, tensors made without a dtype are fp64 where that is: XGLM's attention makes one of
    the least number of its dtype, which must fit.
    """
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64 if dtype == torch.float64 else before)
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def moved(model: nn.Module, direction: Mapping[str, Tensor], step: float) -> Iterator[None]:
    """Inside, the model is at θ + step · direction."""
    named = dict(model.named_parameters())
    with _exchanged(named, {n: named[n].data.add(v, alpha=step) for n, v in direction.items()}):
        yield


@contextmanager
def _exchanged(named: Mapping[str, nn.Parameter], data: Mapping[str, Tensor]) -> Iterator[None]:
    before = {name: named[name].data for name in data}
    try:
        for name, tensor in data.items():
            named[name].data = tensor
        yield
    finally:
        for name, tensor in before.items():
            named[name].grad = None
            named[name].data = tensor


def dot(a: Vector, b: Vector) -> float:
    """⟨a, b⟩, summed in fp64."""
    return math.fsum(
        float((a[name].double() * b[name].double()).sum()) for name in a.keys() & b.keys()
    )


def norm(a: Vector) -> float:
    """‖a‖."""
    return math.hypot(*(float(tensor.norm(dtype=torch.float64)) for tensor in a.values()))


def combined(a: Vector, b: Vector, factor: float) -> Vector:
    """a + factor · b."""
    out = dict(a)
    for name, tensor in b.items():
        out[name] = out[name].add(tensor, alpha=factor) if name in out else factor * tensor
    return out


def scaled(a: Vector, factor: float) -> Vector:
    """factor · a."""
    return {name: factor * tensor for name, tensor in a.items()}


def cosine(a: Vector, b: Vector) -> float:
    """⟨a, b⟩ / ‖a‖‖b‖; 0 where one of them is zero."""
    lengths = norm(a) * norm(b)
    return dot(a, b) / lengths if lengths > 0 else 0.0


def random_like(a: Mapping[str, Tensor], seed: int) -> Vector:
    """Standard normal numbers in the shapes of ``a``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
        for name, tensor in a.items()
    }
