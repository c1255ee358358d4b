"""PyTorch code run on shapes alone: what it would allocate, without the memory or the time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

_META, _CPU = torch.device("meta"), torch.device("cpu")
_aten = torch.ops.aten
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_FEW_ELEMENTS = 1 << 16  # a larger tensor is fake, unless it is no larger than a real one


class ShapesOnly(TorchDispatchMode):
    """Inside, the tensors that are made are fake: they have a shape, a storage and no data.

    Token ids, masks and groups are real, and so is what is computed of them alone: the code may
    depend on their values. Numbers are taken for finite: a comparison of fake ones is true.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors = list(_tensors(args))
        if not tensors:
            made = self._on_shapes(func, args, kwargs)
            return made if _worth_faking(made) else func(*args, **kwargs)
        pointwise = torch.Tag.pointwise in func.tags
        real = not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if real and not (pointwise and _grows(tensors)):
            return func(*args, **kwargs)
        if func in _INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        out = self._on_shapes(func, args, kwargs)
        if pointwise and out.dtype == torch.bool and out.numel() <= _FEW_ELEMENTS:
            return torch.ones(out.shape, dtype=torch.bool)
        return out

    def _on_shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator's meta kernel: shapes, strides, and which outputs share a storage.

        FakeTensorMode runs the same kernels, but takes twice the time.
        """
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _META}
        with in_kernel_invocation_manager(self._fake):
            out = func(*map(_on_meta, args), **kwargs)
            return type(out)(map(self._wrap, out)) if _is_list(out) else self._wrap(out)

    def _wrap(self, out: Any) -> Any:
        """A fake tensor on the CPU for one on the meta device."""
        made = isinstance(out, Tensor) and not isinstance(out, FakeTensor)
        return FakeTensor(self._fake, out, _CPU) if made else out


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _on_meta(value: Any) -> Any:
    """Real tensors among an operator's arguments without their data; fake ones are without."""
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
    return [*map(_on_meta, value)] if _is_list(value) else value


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif _is_list(value):
            yield from _tensors(value)


def _worth_faking(made: Any) -> bool:
    return isinstance(made, Tensor) and (made.is_floating_point() or made.numel() > _FEW_ELEMENTS)


def _grows(tensors: list[Tensor]) -> bool:
    """Whether a pointwise operator on these makes a large tensor of smaller ones."""
    elements = torch.broadcast_shapes(*(tensor.shape for tensor in tensors)).numel()
    return elements > max(_FEW_ELEMENTS, *(tensor.numel() for tensor in tensors))


def _without_masks(indices: Any) -> list[Tensor | None]:
    """Indices for an operator, real masks among them replaced by the places they select."""
    places: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype == torch.bool
        places += index.nonzero().unbind(1) if masks else [index]
    return places
