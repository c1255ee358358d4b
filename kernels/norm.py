"""RMSNorm and LayerNorm with a weight row for each x[b]: the passes of ops/norm.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.norm import Kept, Options
from .launching import run_kernel
from .norm_kernels import (
    norm_backward_kernel,
    norm_double_backward_kernel,
    norm_forward_kernel,
    sum_kernel,
)
from .sizes import cdiv, next_power_of_2

MAX_D = 16384


class Launch(NamedTuple):
    """How a pass walks over rows."""

    rows: int  # of a block of tokens
    warps: int
    stages: int  # blocks of tokens in flight
    programs: int  # about, over all b


# By the largest BLOCK_D, the power of two not below D.
LAUNCHES: dict[str, dict[int, Launch]] = {
    "forward": {
        128: Launch(16, 4, 1, 1 << 20),
        512: Launch(8, 4, 1, 1 << 20),
        1024: Launch(4, 4, 1, 1 << 20),
        2048: Launch(1, 4, 3, 1056),
        4096: Launch(1, 8, 1, 1 << 20),
        8192: Launch(1, 16, 1, 1 << 20),
        16384: Launch(1, 32, 1, 1 << 20),
    },
    "backward": {
        128: Launch(16, 4, 3, 528),
        512: Launch(4, 4, 3, 528),
        1024: Launch(2, 4, 3, 528),
        2048: Launch(1, 4, 3, 528),
        4096: Launch(1, 8, 3, 264),
        8192: Launch(1, 16, 2, 132),
        16384: Launch(1, 32, 1, 132),
    },
    "double_backward": {
        128: Launch(16, 4, 2, 528),
        512: Launch(4, 4, 2, 528),
        1024: Launch(1, 4, 1, 528),
        2048: Launch(1, 4, 3, 264),
        4096: Launch(1, 8, 3, 132),
        8192: Launch(1, 16, 2, 132),
        16384: Launch(1, 32, 1, 132),
    },
}
SUM_TILE = {"BLOCK_P": 32, "BLOCK_D": 32, "num_warps": 4}  # of the partial sums


def norm_forward(
    x: Tensor, weight_BD: Tensor, bias_BD: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, μ (None without ``center``) and r, the latter two [B, …, 1] in fp32."""
    return _forward(x.contiguous(), None, None, weight_BD, bias_BD, eps, center)


def add_norm_forward(
    x: Tensor, residual: Tensor, *options: *Options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """h = x + residual, and y, μ and r of h."""
    x = x.contiguous()
    h = torch.empty_like(x)
    return h, *_forward(x, residual.contiguous(), h, *options)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    h: Tensor | None,
    weight_BD: Tensor,
    bias_BD: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    weight_BD, bias_BD = _rows(weight_BD), None if bias_BD is None else _rows(bias_BD)
    y = torch.empty_like(x)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if center else None
    strides = weight_BD.stride(0), 0 if bias_BD is None else bias_BD.stride(0)
    grid, sizes, constants = _walk("forward", x)
    run_kernel(
        norm_forward_kernel,
        grid,
        x,
        residual,
        weight_BD,
        bias_BD,
        h,
        y,
        mean,
        rstd,
        *sizes,
        *strides,
        eps,
        **constants,
    )
    return y, mean, rstd


def norm_backward(
    dy: Tensor, dh: Tensor | None, into: Tensor | None, with_bias: bool, *kept: *Kept
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx, plus ``dh`` if given, added to ``into`` if given; dγ [B, D] and, ``with_bias``, dβ
    [B, D].
    """
    x, weight_BD, mean, rstd = kept
    dy, x, weight_BD = dy.contiguous(), x.contiguous(), _rows(weight_BD)
    dh = None if dh is None else dh.contiguous()
    dx = torch.empty_like(x) if into is None else into
    grid, sizes, constants = _walk("backward", x)
    parts = _partial_sums(1 + with_bias, x, weight_BD, sizes[1])
    dbias = parts[1] if with_bias else None
    inputs = dy, dh, x, weight_BD, mean, rstd
    run_kernel(
        norm_backward_kernel,
        grid,
        *inputs,
        dx,
        parts[0],
        dbias,
        *sizes,
        weight_BD.stride(0),
        ADD=into is not None,
        **constants,
    )
    sums = _sum_parts(parts, weight_BD.dtype)
    return dx, sums[0], sums[1] if with_bias else None


def norm_double_backward(
    u: Tensor, v_BD: Tensor, w_BD: Tensor | None, dy: Tensor, *kept: *Kept
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of dy, x and γ from those of dx (u), dγ (v) and, if any, dβ (w)."""
    x, weight_BD, mean, rstd = kept
    u, dy, x = u.contiguous(), dy.contiguous(), x.contiguous()
    v_BD, weight_BD, w_BD = _rows(v_BD), _rows(weight_BD), None if w_BD is None else _rows(w_BD)
    cot_dy, cot_x = torch.empty_like(x), torch.empty_like(x)
    grid, sizes, constants = _walk("double_backward", x)
    parts = _partial_sums(1, x, weight_BD, sizes[1])
    strides = v_BD.stride(0), 0 if w_BD is None else w_BD.stride(0), weight_BD.stride(0)
    inputs = u, v_BD, w_BD, dy, x, weight_BD, mean, rstd
    run_kernel(
        norm_double_backward_kernel,
        grid,
        *inputs,
        cot_dy,
        cot_x,
        parts[0],
        *sizes,
        *strides,
        **constants,
    )
    return cot_dy, cot_x, _sum_parts(parts, weight_BD.dtype)[0]


def _rows(t_BD: Tensor) -> Tensor:
    """Rows of consecutive elements; a stride of 0 over B stays."""
    return t_BD if t_BD.stride(-1) == 1 else t_BD.contiguous()


def _walk(pass_: str, x: Tensor) -> tuple[tuple[int], tuple[int, int, int], dict[str, Any]]:
    """The grid; T, P and steps; the constants of a pass over x [B, …, D]."""
    B, *tokens, D = x.shape
    if D > MAX_D:
        raise ValueError(f"x: expected at most {MAX_D} elements in a row, got {D}")
    T, launch = math.prod(tokens), _launch(pass_, D)
    blocks = cdiv(T, launch.rows)
    steps = cdiv(max(1, blocks), min(max(1, blocks), max(1, launch.programs // max(1, B))))
    P = cdiv(blocks, steps)
    return (B * P,), (T, P, steps), _constants(pass_, launch, D)


def _launch(pass_: str, D: int) -> Launch:
    return next(launch for most, launch in LAUNCHES[pass_].items() if most >= D)


def _constants(pass_: str, launch: Launch, D: int) -> dict[str, Any]:
    block_d = next_power_of_2(D)
    constants = {"D": D, "BLOCK_T": launch.rows, "BLOCK_D": block_d, "STAGES": launch.stages}
    most = 16 if torch.version.hip else 32  # 1024 threads
    constants["num_warps"] = warps = min(most, launch.warps)
    if pass_ != "forward":
        # 16 bytes a thread: a shorter row leaves other tokens to some of the threads
        constants["SPREAD"] = launch.rows > 1 and block_d < 256 * warps
    return constants


def _partial_sums(n: int, x: Tensor, weight_BD: Tensor, P: int) -> Tensor:
    """Room for n sums over tokens, [n, B, P, D]; the sums themselves if P is 1."""
    dtype = weight_BD.dtype if P == 1 else torch.float32
    return torch.empty(n, x.shape[0], P, x.shape[-1], dtype=dtype, device=x.device)


def _sum_parts(parts: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Σ_p of [n, B, P, D], as n tensors [B, D]."""
    n, B, P, D = parts.shape
    if P == 1:
        return parts[:, :, 0].unbind(0)
    sums = torch.empty(n, B, D, dtype=dtype, device=parts.device)
    grid = n * B, cdiv(D, SUM_TILE["BLOCK_D"])
    run_kernel(sum_kernel, grid, parts, sums, P, D, **SUM_TILE)
    return sums.unbind(0)
