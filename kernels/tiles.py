"""What the kernels of the vocabulary share: a tile of logits z [G, N, v], its rows and blocks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv, next_power_of_2

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def block_of(z_ptr, row, stride, start, v, BLOCK: tl.constexpr):
    # z[row, start + i] in fp32, −∞ beyond v
    column = start + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * stride + column, mask=column < v, other=float("-inf"))
    return z.to(tl.float32), column


def rows_of(t_GNv: Tensor) -> Tensor:
    """[G·N, v], rows of consecutive elements; of all columns it may be a view."""
    t = t_GNv.flatten(0, 1)
    return t if t.stride(1) == 1 else t.contiguous()


def elementwise(width: int) -> dict[str, int]:
    """The constants of a program to a block of columns of a row."""
    return {"BLOCK": min(BLOCK, next_power_of_2(width)), "num_warps": NUM_WARPS}


def grid(t_GNv: Tensor) -> tuple[int, int]:
    """Of the elementwise kernels."""
    groups, rows, width = t_GNv.shape
    return groups * rows, cdiv(width, elementwise(width)["BLOCK"])
