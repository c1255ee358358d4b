"""Sizes of blocks and grids. Triton's own functions for them also serve inside kernels, for which a
call from Python pays ten times over.
"""

from __future__ import annotations


def cdiv(size: int, block: int) -> int:
    """The number of blocks that hold ``size``."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below ``size``, which is at least 1."""
    return 1 << (size - 1).bit_length()
