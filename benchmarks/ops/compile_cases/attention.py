"""Attention, long and short, with a window and without."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from gdprompt_fast.kernels.attention import launch
from gdprompt_fast.kernels.attention.tiles import Tiles, tiles_of

from .case import Case


def attention_cases(target: str) -> list[Case]:
    """Every kernel as it runs in bf16; ``target`` is sm_80, sm_90, sm_100 or gfx942, each with its
    own tiles.
    """
    long = [(64, 8192, False), (80, 8192, False), (96, 8192, False), (128, 8192, False)]
    bounded = [(64, 8192, True), (128, 8192, True)]
    short = [(64, 256, False), (128, 256, False), (64, 256, True)]
    cases, seen = [], set()
    for name in launch.KERNELS:
        adds = (False, True) if "ADD" in launch.KERNELS[name].function.arg_names else (False,)
        for (dim, tokens, is_bounded), add in itertools.product([*long, *bounded, *short], adds):
            tiles = tiles_of(name, dim, tokens, torch.bfloat16, target)
            case = (name, dim, is_bounded, tiles, add)
            if case not in seen:
                seen.add(case)
                cases.append(attention_case(*case))
    return cases


def attention_case(
    name: str, dim: int, bounded: bool, tiles: Tiles, add: bool = False, dtype: str = "bf16"
) -> Case:
    """A kernel with some tiles, as :func:`attention_cases` has them."""
    kernel = launch.KERNELS[name]
    constants = launch._constants(kernel, tiles, dim, bounded, add)
    block_d = constants["BLOCK_D"]
    blocks = {argument: [1, 1, tiles.queries, block_d] for argument in kernel.by_query_inputs}
    blocks |= {argument: [1, 1, tiles.keys, block_d] for argument in kernel.by_key_inputs}
    if kernel.by_key:
        blocks |= {argument: [1, 1, tiles.queries] for argument in launch.STATISTICS}
    scalars = {"H": "i32", "G": "i32", "T": "i32", "scale": "fp32"}
    signature: dict[str, Any] = {}
    for argument in kernel.function.arg_names:
        row = argument in launch.STATISTICS
        if argument.endswith("_ptr"):
            signature[argument] = "*i32"
        elif argument in scalars:
            signature[argument] = scalars[argument]
        elif argument in blocks and tiles.tma:
            signature[argument] = f"tensordesc<{'fp32' if row else dtype}{blocks[argument]}>"
        elif argument not in constants:
            signature[argument] = (
                ("*fp32", "i32", "i32") if row else (f"*{dtype}", "i32", "i32", "i32")
            )
    extras = f"{', bounded' * bounded}{', adding' * add}, {tiles.queries}x{tiles.keys}"
    pointers = [n for n, kind in signature.items() if isinstance(kind, tuple) or kind[0] == "*"]
    return {
        "name": f"{kernel.function.fn.__name__} D={dim}{extras}",
        "kernel": kernel.function,
        "signature": signature,
        "constexprs": constants,
        "aligned": pointers,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
