"""How the attention kernels are cut up: one table, by GPU, head dim and length of the texts."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

SHORT = 512  # tokens up to which a text is short


class Tiles(NamedTuple):
    """How a kernel is cut up: ``queries`` × ``keys`` scores at a time."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    split: bool = True  # blocks that need no mask in a loop of their own
    tma: bool = False  # inputs through the copy engine, where they are aligned for it
    sweeps: int = 1  # over the keys, of the double backward by query


# In bf16 and fp16 on sm_90, by head dim (up to 64, up to 128) and length: each warp group of four
# warps has the 64 rows that wgmma wants (queries, or keys in the kernels over key blocks); nothing
# spills. Those of head dim 64 were the fastest of 53 on an H200.
SM_90: dict[str, dict[tuple[int, str], Tiles]] = {
    "forward": {
        (64, "short"): Tiles(64, 32, 4, 3, split=False, tma=True),
        (64, "long"): Tiles(64, 64, 4, 2, tma=True),
        (128, "short"): Tiles(128, 64, 8, 2, tma=True),
        (128, "long"): Tiles(128, 64, 8, 2, tma=True),
    },
    "backward_query": {
        (64, "short"): Tiles(64, 32, 4, 3, split=False, tma=True),
        (64, "long"): Tiles(64, 64, 4, 3, tma=True),
        (128, "short"): Tiles(128, 64, 8, 2, tma=True),
        (128, "long"): Tiles(128, 64, 8, 2, tma=True),
    },
    "backward_key": {
        (64, "short"): Tiles(32, 64, 4, 3, split=False, tma=True),
        (64, "long"): Tiles(64, 64, 4, 3, tma=True),
        (128, "short"): Tiles(32, 128, 8, 2, tma=True),
        (128, "long"): Tiles(32, 128, 8, 2, tma=True),
    },
    "double_backward_query": {
        (64, "short"): Tiles(64, 32, 4, 3, tma=True),
        (64, "long"): Tiles(64, 32, 4, 3, tma=True),
        (128, "short"): Tiles(128, 16, 8, 2, tma=True, sweeps=2),
        (128, "long"): Tiles(128, 16, 8, 2, tma=True, sweeps=2),
    },
    "double_backward_key": {
        (64, "short"): Tiles(64, 64, 4, 2, tma=True),
        (64, "long"): Tiles(64, 64, 4, 2, tma=True),
        (128, "short"): Tiles(16, 128, 8, 2, split=False, tma=True),
        (128, "long"): Tiles(16, 128, 8, 2, split=False, tma=True),
    },
}


@functools.cache
def target_of(device: torch.device) -> str:
    """The GPU whose tiles fit: sm_80 stands for those without wgmma or tcgen05."""
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":  # Triton's interpreter
        return "sm_90"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def tiles_of(kernel: str, dim: int, tokens: int, dtype: torch.dtype, target: str) -> Tiles:
    """The tiles of a kernel, by its name in ``SM_90``."""
    if dtype == torch.float32:  # without matrix instructions the operands live in registers
        return Tiles(16, 16, 8, 1)
    if dim > 128:
        return Tiles(32, 16, 8, 1)
    if target == "gfx942":
        return Tiles(32, 32, 4, 1)
    if target == "sm_80":
        tiles = Tiles(64, 32, 4, 2, sweeps=2) if dim <= 64 else Tiles(32, 32, 8, 2, sweeps=2)
        return tiles._replace(split=kernel != "double_backward_query")  # two loops of it spill
    if target == "sm_100" and kernel == "double_backward_query":
        return Tiles(128 if dim <= 64 else 64, 32, 8, 2, sweeps=2)  # by the tensor memory
    length = "short" if tokens <= SHORT or target == "sm_100" else "long"  # the smaller, there
    tiles = SM_90[kernel][64 if dim <= 64 else 128, length]
    return tiles if target == "sm_90" else tiles._replace(tma=False)
