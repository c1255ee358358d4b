"""What the GPU's bulk copy engine reads."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def begins_aligned(t: Tensor) -> bool:
    """Whether it begins at a multiple of 16 bytes; as if allocated, if it has no memory."""
    return isinstance(t, FakeTensor) or t.data_ptr() % 16 == 0


def describable(t: Tensor) -> bool:
    """Whether it and all its rows begin at multiples of 16 bytes."""
    bits = 0  # that any stride has: a multiple of 16 bytes has none of the lowest
    for stride in t.stride()[:-1]:
        bits |= stride
    return bits * t.element_size() % 16 == 0 and begins_aligned(t)
