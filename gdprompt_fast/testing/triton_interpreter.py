"""Makes Triton's interpreter (3.6 to 3.9) right for bf16, ``tl.dot`` and fp32 → bf16 casts, lets
3.6 loop to a run-time bound with numpy ≥ 2.4, and spares most of the time.

Elementwise arithmetic on bf16 stays wrong there, so kernels convert to fp32 right after every load.
"""

from __future__ import annotations

import math
from operator import index
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def mend() -> None:
    """Replaces operations of the interpreter, for the rest of the process."""
    _mend_bf16()
    _patch_the_language_once()
    _remember_types()
    _spare_what_changes_nothing()


def _to_fp32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _mend_bf16() -> None:
    builder: Any = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        def up(handle: Any) -> Any:
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            return interpreter.TensorHandle(_to_fp32(handle.data), tl.float32)

        return dot(self, up(a), up(b), d, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        names, shape = (source.dtype.scalar.name, target.scalar.name), source.data.shape
        if names == ("fp32", "bf16"):
            return interpreter.TensorHandle(_to_bf16(source.data).reshape(shape), tl.bfloat16)
        if names == ("bf16", "fp32"):
            return interpreter.TensorHandle(_to_fp32(source.data).reshape(shape), tl.float32)
        return cast(self, source, target)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.create_fp_trunc = lambda self, source, target: self.cast_impl(source, target)


def _patch_the_language_once() -> None:
    """At the first launch and for good; the interpreter does it at every call of a function."""
    patch, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    patched: list[Any] = []

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    def patch_once(_function: Any) -> Any:
        if not patched:
            everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
            patched.append(patch(everything))
        return interpreter._LangPatchScope()

    interpreter._patch_lang_tensor, interpreter._patch_lang = patch_tensor_and_index, patch_once


def _remember_types() -> None:
    """The type of a block, and what of a tensor follows from its type, are made once."""
    core: Any = tl.core
    make_block, np_dtype = core.block_type.__init__, interpreter._get_np_dtype
    blocks: dict[Any, dict[str, Any]] = {}
    sizes: dict[Any, tuple[Any, Any]] = {}
    np_dtypes: dict[str, Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(map(index, shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in sizes:
            numel = core.constexpr(math.prod(shape))
            sizes[shape] = core.tuple([core.constexpr(size) for size in shape]), numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = sizes[shape]

    def get_np_dtype(type: Any) -> Any:
        name = type.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(type)
        return np_dtypes[name]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = get_np_dtype


def _spare_what_changes_nothing() -> None:
    """Broadcasting to the shape that is there; sums that show an overflow, which nobody reads but
    with ``debug``.
    """
    semantic: Any = TritonSemantic
    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, left: Any, right: Any) -> Any:
        # the sizes of a shape are made once
        return (left, right) if left.shape is right.shape else broadcast(self, left, right)

    semantic.broadcast_impl_value = broadcast_impl_value
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
