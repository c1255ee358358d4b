"""RMSNorm and LayerNorm with a weight row for each x[b]: the three passes of ops/norm.py.

A program holds BLOCK_T tokens of one b and the whole of D in registers. Where tokens are summed, it
walks over STEPS such blocks and writes one fp32 row of the partial sums [B, P, D]. Beyond D = 4096
registers run out on NVIDIA: the double backward then spills some of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_D = 16384
TILE_ELEMENTS = 2048  # of one block of tokens
ELEMENTS_PER_WARP = 256
SUMMING_PROGRAMS = 256  # about two for each multiprocessor of an H200


@triton.jit(do_not_specialize=["T", "P"])
def _norm_forward_kernel(
    x_ptr,  # [B, T, D] in
    weight_ptr,  # [B, D] in, rows weight_stride apart
    bias_ptr,  # [B, D] in, rows bias_stride apart, or None
    y_ptr,  # [B, T, D] out, x's dtype
    mean_ptr,  # [B, T] out, fp32, or None for RMSNorm
    rstd_ptr,  # [B, T] out, fp32
    T,
    D,
    P,  # programs for each b
    weight_stride,
    bias_stride,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # y = (x − μ) r ∘ γ + β,  μ = mean(x) or 0,  r = (mean((x − μ)²) + ε)^-½
    program = tl.program_id(0).to(tl.int64)
    b = program // P
    token = (program % P) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    in_row = column < D
    live = (token < T)[:, None] & in_row[None, :]
    at = (b * T + token)[:, None] * D + column[None, :]

    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    gamma = tl.load(weight_ptr + b * weight_stride + column, mask=in_row, other=0.0).to(tl.float32)
    if mean_ptr is not None:
        mean = tl.sum(x, 1) / D
        tl.store(mean_ptr + b * T + token, mean, mask=token < T)
        x = tl.where(live, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(rstd_ptr + b * T + token, rstd, mask=token < T)
    y = x * rstd[:, None] * gamma[None, :]
    if bias_ptr is not None:
        beta = tl.load(bias_ptr + b * bias_stride + column, mask=in_row, other=0.0).to(tl.float32)
        y += beta[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _standardise(x, mean_ptr, rstd_ptr, token, live):
    # x̂ = (x − μ) r, and r; 0 for tokens that are not live
    rstd = tl.load(rstd_ptr + token, mask=live, other=0.0)[:, None]
    if mean_ptr is not None:
        x -= tl.load(mean_ptr + token, mask=live, other=0.0)[:, None]
    return x * rstd, rstd


@triton.jit
def _row_means(a, b, c, d, D):
    # of four [BLOCK_T, BLOCK_D], as [BLOCK_T, 1]: joined, they share the barriers of one reduction
    sums = tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 1) / D
    ab, cd = tl.split(sums)
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a[:, None], b[:, None], c[:, None], d[:, None]


@triton.jit(do_not_specialize=["T", "P"])
def _norm_backward_kernel(
    dy_ptr,  # [B, T, D] in
    x_ptr,  # [B, T, D] in
    weight_ptr,  # [B, D] in, rows weight_stride apart
    mean_ptr,  # [B, T] in, fp32, or None for RMSNorm
    rstd_ptr,  # [B, T] in, fp32
    dx_ptr,  # [B, T, D] out, x's dtype
    dweight_ptr,  # [B, P, D] out, fp32
    dbias_ptr,  # [B, P, D] out, fp32
    T,
    D,
    P,
    weight_stride,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # dx = r (g − x̂ mean(g ∘ x̂) − mean(g)), g = dy ∘ γ;  dγ = Σ_t dy ∘ x̂;  dβ = Σ_t dy
    program = tl.program_id(0).to(tl.int64)
    b = program // P
    first = (program % P) * STEPS * BLOCK_T
    column = tl.arange(0, BLOCK_D)
    in_row = column < D
    dweight = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for step in range(STEPS):
        token = first + step * BLOCK_T + tl.arange(0, BLOCK_T)
        live = (token < T)[:, None] & in_row[None, :]
        at = (b * T + token)[:, None] * D + column[None, :]
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        xhat, rstd = _standardise(x, mean_ptr, rstd_ptr, b * T + token, token < T)

        dweight += dy * xhat
        dbias += dy
        gamma = tl.load(weight_ptr + b * weight_stride + column, mask=in_row, other=0.0)
        g = dy * gamma.to(tl.float32)[None, :]
        if mean_ptr is not None:
            g_xhat, g_mean = tl.split(tl.sum(tl.join(g * xhat, g), 1) / D)
            dx = g - xhat * g_xhat[:, None] - g_mean[:, None]
        else:
            dx = g - xhat * (tl.sum(g * xhat, 1) / D)[:, None]
        tl.store(dx_ptr + at, (dx * rstd).to(dx_ptr.dtype.element_ty), mask=live)
    tl.store(dweight_ptr + program * D + column, tl.sum(dweight, 0), mask=in_row)
    tl.store(dbias_ptr + program * D + column, tl.sum(dbias, 0), mask=in_row)


@triton.jit(do_not_specialize=["T", "P"])
def _norm_double_backward_kernel(
    u_ptr,  # [B, T, D] in, cotangent of dx
    v_ptr,  # [B, D] in, cotangent of dγ, rows v_stride apart
    w_ptr,  # [B, D] in, cotangent of dβ, rows w_stride apart
    dy_ptr,  # [B, T, D] in
    x_ptr,  # [B, T, D] in
    weight_ptr,  # [B, D] in, rows weight_stride apart
    mean_ptr,  # [B, T] in, fp32, or None for RMSNorm
    rstd_ptr,  # [B, T] in, fp32
    cot_dy_ptr,  # [B, T, D] out, x's dtype
    cot_x_ptr,  # [B, T, D] out, x's dtype
    cot_weight_ptr,  # [B, P, D] out, fp32
    T,
    D,
    P,
    v_stride,
    w_stride,
    weight_stride,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # With Q g = r (g − x̂ mean(g ∘ x̂) − mean(g)), g = dy ∘ γ, dx = Q g:
    #   cot dy = (Q u) ∘ γ + v ∘ x̂ + w;   cot γ = Σ_t (Q u) ∘ dy
    #   cot x  = Q (v ∘ dy − r mean(g ∘ x̂) u − r mean(u ∘ x̂) g) − r x̂ mean(u ∘ dx)
    # with its means taken apart into those of g, u, v ∘ dy and their products: one reduction
    program = tl.program_id(0).to(tl.int64)
    b = program // P
    first = (program % P) * STEPS * BLOCK_T
    column = tl.arange(0, BLOCK_D)
    in_row = column < D
    cot_weight = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for step in range(STEPS):
        token = first + step * BLOCK_T + tl.arange(0, BLOCK_T)
        live = (token < T)[:, None] & in_row[None, :]
        at = (b * T + token)[:, None] * D + column[None, :]
        u = tl.load(u_ptr + at, mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        xhat, rstd = _standardise(x, mean_ptr, rstd_ptr, b * T + token, token < T)

        gamma = tl.load(weight_ptr + b * weight_stride + column, mask=in_row, other=0.0)
        gamma = gamma.to(tl.float32)[None, :]
        v = tl.load(v_ptr + b * v_stride + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
        w = tl.load(w_ptr + b * w_stride + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
        g = dy * gamma
        vdy = v * dy
        g_xhat, u_xhat, u_g, vdy_xhat = _row_means(g * xhat, u * xhat, u * g, vdy * xhat, D)
        along = vdy_xhat + rstd * (u_g - 3.0 * g_xhat * u_xhat)  # the multiple of x̂ in cot x
        qu = u - xhat * u_xhat
        cot_x = vdy - rstd * (g_xhat * u + u_xhat * g)
        if mean_ptr is not None:
            g_mean, u_mean, vdy_mean, _ = _row_means(g, u, vdy, vdy, D)
            along -= rstd * g_mean * u_mean
            qu -= u_mean
            cot_x -= vdy_mean - rstd * (g_xhat * u_mean + u_xhat * g_mean)
        cot_x = (cot_x - xhat * along) * rstd
        qu *= rstd
        cot_weight += qu * dy
        cot_dy = qu * gamma + v * xhat + w
        tl.store(cot_dy_ptr + at, cot_dy.to(cot_dy_ptr.dtype.element_ty), mask=live)
        tl.store(cot_x_ptr + at, cot_x.to(cot_x_ptr.dtype.element_ty), mask=live)
    tl.store(cot_weight_ptr + program * D + column, tl.sum(cot_weight, 0), mask=in_row)


def norm_forward(
    x: Tensor, weight_BD: Tensor, bias_BD: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, μ (None without ``center``) and r, the latter two [B, …, 1] in fp32."""
    x, weight_BD = x.contiguous(), _rows(weight_BD)
    bias_BD = _rows(bias_BD) if bias_BD is not None else None
    B, T, D = _sizes(x)
    y = torch.empty_like(x)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if center else None
    tile = _tile(D)
    programs = triton.cdiv(T, tile["BLOCK_T"])
    with torch.cuda.device_of(x):
        _norm_forward_kernel[(B * programs,)](
            x,
            weight_BD,
            bias_BD,
            y,
            mean,
            rstd,
            T,
            D,
            programs,
            weight_BD.stride(0),
            bias_BD.stride(0) if bias_BD is not None else 0,
            eps,
            **tile,
        )
    return y, mean, rstd


def norm_backward(
    dy: Tensor, x: Tensor, weight_BD: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dγ [B, D] and dβ [B, D]."""
    dy, x, weight_BD = dy.contiguous(), x.contiguous(), _rows(weight_BD)
    B, T, D = _sizes(x)
    tile = _tile(D)
    steps, programs = _walk(B, T, tile["BLOCK_T"])
    dx = torch.empty_like(x)
    sums = torch.empty(2, B, programs, D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _norm_backward_kernel[(B * programs,)](
            dy,
            x,
            weight_BD,
            mean,
            rstd,
            dx,
            sums[0],
            sums[1],
            T,
            D,
            programs,
            weight_BD.stride(0),
            STEPS=steps,
            **tile,
        )
    dweight, dbias = (each.sum(1).to(weight_BD.dtype) for each in (sums[0], sums[1]))
    return dx, dweight, dbias


def norm_double_backward(
    u: Tensor,
    v_BD: Tensor,
    w_BD: Tensor,
    dy: Tensor,
    x: Tensor,
    weight_BD: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of dy, x and γ from those of dx (u), dγ (v) and dβ (w)."""
    u, dy, x = u.contiguous(), dy.contiguous(), x.contiguous()
    v_BD, w_BD, weight_BD = _rows(v_BD), _rows(w_BD), _rows(weight_BD)
    B, T, D = _sizes(x)
    tile = _tile(D)
    steps, programs = _walk(B, T, tile["BLOCK_T"])
    cot_dy, cot_x = torch.empty_like(x), torch.empty_like(x)
    sums = torch.empty(B, programs, D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _norm_double_backward_kernel[(B * programs,)](
            u,
            v_BD,
            w_BD,
            dy,
            x,
            weight_BD,
            mean,
            rstd,
            cot_dy,
            cot_x,
            sums,
            T,
            D,
            programs,
            v_BD.stride(0),
            w_BD.stride(0),
            weight_BD.stride(0),
            STEPS=steps,
            **tile,
        )
    return cot_dy, cot_x, sums.sum(1).to(weight_BD.dtype)


def _rows(t_BD: Tensor) -> Tensor:
    """Rows of consecutive elements; a stride of 0 over B stays."""
    return t_BD if t_BD.stride(-1) == 1 else t_BD.contiguous()


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """[B, …, D] as B, T, D."""
    B, *tokens, D = x.shape
    if D > MAX_D:
        raise ValueError(f"x: expected at most {MAX_D} elements in a row, got {D}")
    return B, math.prod(tokens), D


def _tile(D: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(D)
    block_t = max(1, TILE_ELEMENTS // block_d)
    most = 16 if torch.version.hip else 32  # 1024 threads
    warps = min(most, max(1, block_t * block_d // ELEMENTS_PER_WARP))
    return {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": warps}


def _walk(B: int, T: int, block_t: int) -> tuple[int, int]:
    """Blocks of tokens that a program of a sum walks over, and programs for each b."""
    blocks = B * triton.cdiv(T, block_t)
    steps = triton.next_power_of_2(max(1, triton.cdiv(blocks, SUMMING_PROGRAMS)))
    return steps, triton.cdiv(T, block_t * steps)


def compile_cases(_target: str) -> list[dict[str, Any]]:
    """What benchmarks/compile_kernels.py compiles: norms of heads and of Llama 1B and 8B."""
    cases = []
    for kind, D in (("rms", 128), ("rms", 2048), ("rms", 4096), ("layer", 4096)):
        tile = _tile(D)
        warps = tile.pop("num_warps")
        types = dict.fromkeys(("T", "D", "P", "weight_stride", "v_stride", "w_stride"), "i32")
        types |= dict.fromkeys(("dweight_ptr", "dbias_ptr", "cot_weight_ptr"), "*fp32")
        types |= {"bias_stride": "i32", "eps": "fp32", "rstd_ptr": "*fp32", "mean_ptr": "*fp32"}
        constexprs = {"STEPS": 16, **tile}
        if kind == "rms":
            constexprs |= {"mean_ptr": None, "bias_ptr": None}
        for kernel in (_norm_forward_kernel, _norm_backward_kernel, _norm_double_backward_kernel):
            names = kernel.arg_names
            cases.append(
                {
                    "name": f"{kernel.fn.__name__.strip('_').removesuffix('_kernel')} {kind} D={D}",
                    "kernel": kernel,
                    "signature": {n: types.get(n, "*bf16") for n in names if n not in constexprs},
                    "constexprs": {n: value for n, value in constexprs.items() if n in names},
                    "aligned": ["D", "weight_stride", "bias_stride", "v_stride", "w_stride"],
                    "num_warps": warps,
                    "num_stages": 3,
                }
            )
    return cases
