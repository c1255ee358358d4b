"""How an attention kernel is started."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...ops.attention import Visible
from ..copy_engine import describable
from ..launching import descriptor, run_kernel
from ..sizes import cdiv, next_power_of_2
from .backward import attention_backward_key_kernel, attention_backward_query_kernel
from .double_backward import (
    attention_double_backward_key_kernel,
    attention_double_backward_query_kernel,
)
from .forward import attention_forward_kernel
from .tiles import Tiles, target_of, tiles_of


class Kernel(NamedTuple):
    """A kernel, whether its programs are blocks of keys, and its inputs, in its own order."""

    function: Any
    by_key: bool
    by_query_inputs: tuple[str, ...]  # [B, H, T, D]
    by_key_inputs: tuple[str, ...]  # [B, K, T, D]


STATISTICS = "lse", "delta", "sigma", "tau"  # [B, H, T], fp32
COTANGENTS = "cot_dk", "cot_dv", "k", "v"
KERNELS = {
    "forward": Kernel(attention_forward_kernel, False, ("q",), ("k", "v")),
    "backward_query": Kernel(
        attention_backward_query_kernel, False, ("do", "q", "out"), ("k", "v")
    ),
    "backward_key": Kernel(attention_backward_key_kernel, True, ("do", "q"), ("k", "v")),
    "double_backward_query": Kernel(
        attention_double_backward_query_kernel, False, ("cot_dq", "do", "q", "out"), COTANGENTS
    ),
    "double_backward_key": Kernel(
        attention_double_backward_key_kernel, True, ("cot_dq", "do", "q"), COTANGENTS
    ),
}


def launch_kernel(
    name: str,
    inputs: dict[str, Tensor],
    outputs: tuple[Tensor, ...],
    rows: tuple[Tensor, ...],
    scale: float,
    visible: Visible,
    add: bool = False,
) -> None:
    """Runs a kernel on [B, H or K, T, D] tensors and the row statistics [B, H, T]; with ``add``,
    what it makes is added to the outputs.
    """
    kernel = KERNELS[name]
    batch, heads, tokens, dim = inputs["q"].shape
    kv_heads = inputs["k"].shape[1]
    if outputs[0].numel() == 0:
        return
    tiles = tiles_of(name, dim, tokens, inputs["q"].dtype, target_of(inputs["q"].device))
    block_d = max(16, next_power_of_2(dim))
    arguments = [_input(inputs[n], tiles, tiles.queries, block_d) for n in kernel.by_query_inputs]
    arguments += [_input(inputs[n], tiles, tiles.keys, block_d) for n in kernel.by_key_inputs]
    arguments += [_strided(t) for t in outputs]
    if kernel.by_key:
        arguments += [_input(row, tiles, tiles.queries) for row in rows]
    else:  # each is read once, or written
        arguments += [_strided(row) for row in rows]
    bounds: tuple[Tensor | None, ...] = visible or (None, None)
    if kernel.by_key:
        grid = (batch * kv_heads, cdiv(tokens, tiles.keys))
    else:
        grid = (batch * heads, cdiv(tokens, tiles.queries))
        bounds = bounds[:1]
    run_kernel(
        kernel.function,
        grid,
        *arguments,
        *bounds,
        heads,
        heads // kv_heads,
        tokens,
        scale,
        **_constants(kernel, tiles, dim, visible is not None, add),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _input(t: Tensor, tiles: Tiles, *block: int) -> Any:
    """A descriptor for the copy engine, where it can read the tensor."""
    if tiles.tma and describable(t):
        return descriptor(t, [1, 1, *block])
    return _strided(t)


def _strided(t: Tensor) -> tuple[Any, ...]:
    return (t, *t.stride()[:-1])


def _constants(kernel: Kernel, tiles: Tiles, dim: int, bounded: bool, add: bool) -> dict[str, Any]:
    constants = {
        "D": dim,
        "BLOCK_D": max(16, next_power_of_2(dim)),
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
        "BOUNDED": bounded,
        "SPLIT": tiles.split,
        "SWEEPS": tiles.sweeps,
        "ADD": add,
    }
    return {name: constants[name] for name in kernel.function.arg_names if name in constants}
