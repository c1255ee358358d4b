"""PyTorch code run on shapes alone: what it would allocate, without the memory or the time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE_OF = torch.ops.prim.device.default  # half of all calls, and of fake tensors alone
_META, _CPU = torch.device("meta"), torch.device("cpu")
_aten = torch.ops.aten
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_FEW_ELEMENTS = 1 << 16  # a larger tensor is fake, unless it is no larger than a real one
_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
# Of an operator's new tensor, by the operator and its arguments; None if it returns its first one.
_known: dict[Any, _Layout | None] = {}


class NeverCompiled(TorchDispatchMode):
    """Nothing is compiled inside; to be kept from it takes time at every call."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class ShapesOnly(NeverCompiled):
    """Inside, the tensors that are made are fake: they have a shape, a storage and no data.

    Token ids, masks and groups are real, and so is what is computed of them alone: the code may
    depend on their values. Numbers are taken for finite: a comparison of fake ones is true.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF:
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

        FakeTensorMode runs the same kernels, but takes twice the time. Most are written in Python:
        what a new tensor looks like is asked once.
        """
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _META}
        call = func, _described(args), _described(tuple(kwargs.items()))
        if call in _known:
            layout = _known[call]
            return args[0] if layout is None else self._wrap(_empty(*layout))
        with in_kernel_invocation_manager(self._fake):
            out = func(*map(_on_meta, args), **kwargs)
            if args and out is args[0] and _described(args) == call[1]:
                _known[call] = None
            elif isinstance(out, Tensor) and _is_new(out, args):
                _known[call] = out.shape, out.stride(), out.dtype
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
        return _empty(value.shape, value.stride(), value.dtype)
    return [*map(_on_meta, value)] if _is_list(value) else value


def _empty(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=_META)


def _described(value: Any) -> Any:
    """What a meta kernel can see of an argument; of equal numbers the types differ."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_described, value)) if _is_list(value) else (type(value), value)


def _is_new(out: Tensor, args: Any) -> bool:
    """Whether an output shares its storage with no argument, and is all that is in it."""
    storage = out.untyped_storage()
    if any(tensor.untyped_storage()._cdata == storage._cdata for tensor in _tensors(args)):
        return False
    alone = _empty(out.shape, out.stride(), out.dtype)
    return out.storage_offset() == 0 and alone.untyped_storage().nbytes() == storage.nbytes()


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
