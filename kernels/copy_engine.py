"""What the GPU's bulk copy engine reads."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def begins_aligned(t: Tensor) -> bool:
    """Whether it begins at a multiple of 16 bytes; as if allocated, if it has no memory."""
    return isinstance(t, FakeTensor) or t.data_ptr() % 16 == 0


def describable(t: Tensor) -> bool:
    """Whether it and all its rows begin at multiples of 16 bytes."""
    return begins_aligned(t) and all(n * t.element_size() % 16 == 0 for n in t.stride()[:-1])
