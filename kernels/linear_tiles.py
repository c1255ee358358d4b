"""Tile sizes of the fused inner update by the class of shape, and where cuBLAS does better."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sizes import cdiv, next_power_of_2


class Tiles(NamedTuple):
    """What one program makes, of what blocks, and how it is run.

    ``split`` programs share one block's sums. ``tma``: the bulk copy engine brings the tiles,
    where it can. ``halved``: the groups' part is done by halves of the rows, which meet fewer
    groups each.
    """

    rows: int
    outputs: int
    inputs: int
    context: int
    warps: int
    stages: int
    split: int = 1
    tma: bool = False
    halved: bool = False

    @property
    def update_rows(self) -> int:
        return self.rows // 2 if self.halved else self.rows

    def constexprs(self) -> dict[str, Any]:
        return dict(
            HALVED=self.halved,
            SPLIT=self.split,
            BLOCK_R=self.rows,
            BLOCK_O=self.outputs,
            BLOCK_I=self.inputs,
            BLOCK_S=self.context,
        )


# Any GPU.
POINTERS = Tiles(64, 128, 64, 64, warps=4, stages=3)
POINTERS_FP32 = Tiles(64, 64, 32, 32, warps=4, stages=3)
# Triton's interpreter pays for steps, not for sizes.
INTERPRETED = Tiles(128, 128, 64, 64, warps=4, stages=3)

WASTE = 1.5  # products done to products needed, from which on cuBLAS runs

# Half precision on Hopper, by ``shape_class``. A class that is not here is cuBLAS's, which was as
# fast or faster there on an H200.
HOPPER = {
    ("tiny", "middle", "narrow"): Tiles(64, 32, 128, 16, warps=4, stages=6, tma=True),
    ("tiny", "middle", "middle"): Tiles(64, 32, 128, 16, warps=4, stages=6, tma=True),
    ("tiny", "long", "middle"): Tiles(64, 64, 64, 16, warps=4, stages=5, split=4, tma=True),
    ("few", "middle", "narrow"): Tiles(64, 32, 128, 128, warps=4, stages=4, tma=True),
    ("few", "short", "middle"): Tiles(64, 64, 128, 128, warps=4, stages=3, tma=True),
    ("few", "middle", "wide"): Tiles(128, 128, 64, 64, warps=4, stages=3, tma=True, halved=True),
    ("many", "middle", "middle"): Tiles(128, 128, 64, 64, warps=4, stages=3, tma=True),
}


def choose_tiles(x_GMI: Tensor, factor_GSO: Tensor) -> Tiles | None:
    """What the kernel runs with on these shapes; None where cuBLAS is to run."""
    groups, rows, inputs = x_GMI.shape
    context, outputs = factor_GSO.shape[1:]
    if x_GMI.device.type == "cpu":
        return INTERPRETED
    if x_GMI.dtype == torch.float32:
        return POINTERS_FP32
    if not is_hopper(x_GMI.device):
        return POINTERS
    tiles = HOPPER.get(shape_class(groups * rows, inputs, outputs))
    if tiles is None or inputs % 8 or outputs % 8:  # the bulk copy engine reads 16 bytes
        return None
    tiles = tiles._replace(context=min(tiles.context, max(16, next_power_of_2(context))))
    wasteful = products_done(tiles, groups, rows, inputs, context) > WASTE * (inputs + context)
    return None if wasteful else tiles


def products_done(tiles: Tiles, groups: int, rows: int, inputs: int, context: int) -> int:
    """Of a row with every column of W and E: a block's rows meet the contexts of all its groups."""
    block = tiles.update_rows
    aligned = rows % block == 0 or block % rows == 0
    met = min(groups, cdiv(block, rows) + (not aligned))
    return inputs + met * cdiv(context, tiles.context) * tiles.context


def shape_class(rows: int, inputs: int, outputs: int) -> tuple[str, str, str]:
    """The key of ``HOPPER``, of all groups' rows together."""
    few = "tiny" if rows <= 128 else "few" if rows <= 1024 else "many"
    long = "short" if inputs <= 1024 else "middle" if inputs <= 4096 else "long"
    wide = "narrow" if outputs <= 1024 else "middle" if outputs <= 4096 else "wide"
    return few, long, wide


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
