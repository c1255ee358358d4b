"""Passes over tiles of logits."""

from __future__ import annotations

from typing import Any

from gdprompt_fast.kernels import online, vocabulary
from gdprompt_fast.kernels.tiles import elementwise

from .case import Case

WIDTHS = 4096, 16384, 32768


def online_cases(_target: str) -> list[Case]:
    """Rows in registers, and longer ones."""
    kernels = [
        *(
            (kernel, v)
            for kernel in (online._online_softmax_kernel, online._online_kl_kernel)
            for v in WIDTHS
        ),
        (online._accumulate_kernel, 0),
    ]
    return [
        _tile_case(kernel, f" v={v}" * bool(v), dtype, online._sweep(v) if v else elementwise(1024))
        for dtype in ("bf16", "fp32")
        for kernel, v in kernels
    ]


def vocabulary_cases(_target: str) -> list[Case]:
    """Tiles in bf16 and fp32, of both kinds of columns."""
    contiguous = {"columns_ptr": None}
    kernels: list[tuple[Any, str, dict[str, Any]]] = [
        (vocabulary._softmax_difference_kernel, "", {}),
        (vocabulary._softmax_minus_one_hot_kernel, "", contiguous),
        (vocabulary._softmax_minus_one_hot_kernel, " own columns", {}),
        (vocabulary._logit_cotangent_kernel, "", contiguous),
        (vocabulary._logit_cotangent_kernel, " own columns", {}),
    ]
    return [
        _tile_case(kernel, kind, dtype, elementwise(1024) | absent)
        for dtype in ("bf16", "fp32")
        for kernel, kind, absent in kernels
    ]


def _tile_case(kernel: Any, kind: str, dtype: str, constants: dict[str, Any]) -> Case:
    """A kernel on tiles of a dtype."""
    rows = ("lse", "t_lse", "top", "total", "picked", "gap", "new", "new_gap", "sum", "shrink")
    types = {f"{name}_ptr": "*fp32" for name in (*rows, "center", "weight")}
    types |= dict.fromkeys(("id_ptr", "columns_ptr"), "*i64")
    warps = constants.pop("num_warps")
    return {
        "name": f"{kernel.fn.__name__.strip('_').removesuffix('_kernel')} {dtype}{kind}",
        "kernel": kernel,
        "signature": {
            n: types.get(n, f"*{dtype}" if n.endswith("_ptr") else "i32")
            for n in kernel.arg_names
            if n not in constants
        },
        "constexprs": constants,
        "aligned": ["v", "z_stride", "t_stride", "stride", "X"],
        "num_warps": warps,
        "num_stages": 3,
    }
