"""RMSNorm and LayerNorm: the kernels that norm.py launches.

A program holds whole rows of D elements in registers and walks over blocks of tokens of one b, the
next ones loaded meanwhile. Where tokens are summed it writes one row of the partial sums [B, P, D],
which a second kernel adds up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row_of(ptr, b, stride, column, in_row):
    # t[b] of a matrix [B, D], as [1, D] in fp32
    return tl.load(ptr + b * stride + column, mask=in_row, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _live(token, in_row, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    # which elements of a block are there, [BLOCK_T, BLOCK_D] or [BLOCK_T, 1]
    if D == BLOCK_D:
        return (token < T)[:, None]
    else:
        return (token < T)[:, None] & in_row[None, :]


@triton.jit
def _standardise(x, mean_ptr, rstd_ptr, token, live):
    # x̂ = (x − μ) r, and r; 0 for tokens that are not live
    rstd = tl.load(rstd_ptr + token, mask=live, other=0.0)[:, None]
    if mean_ptr is not None:
        x -= tl.load(mean_ptr + token, mask=live, other=0.0)[:, None]
    return x * rstd, rstd


@triton.jit
def _add_tokens(total, x, SPREAD: tl.constexpr):
    # total + Σ_t x; where tokens are spread over lanes, their sum waits for the end
    if SPREAD:
        return total + x
    else:
        return total + tl.sum(x, 0)[None, :]


@triton.jit
def _row_means(a, b, c, d, D):
    # of four [BLOCK_T, BLOCK_D], as [BLOCK_T, 1]: joined, they share the barriers of one reduction
    sums = tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 1) / D
    ab, cd = tl.split(sums)
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a[:, None], b[:, None], c[:, None], d[:, None]


@triton.jit(do_not_specialize=["T", "P", "steps"])
def norm_forward_kernel(
    x_ptr,  # [B, T, D] in
    residual_ptr,  # [B, T, D] in, or None
    weight_ptr,  # [B, D] in, rows weight_stride apart
    bias_ptr,  # [B, D] in, rows bias_stride apart, or None
    h_ptr,  # [B, T, D] out, x's dtype; None without a residual
    y_ptr,  # [B, T, D] out, x's dtype
    mean_ptr,  # [B, T] out, fp32, or None for RMSNorm
    rstd_ptr,  # [B, T] out, fp32
    T,
    P,  # programs for each b
    steps,
    weight_stride,
    bias_stride,
    eps,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    # h = x + residual;  y = (h − μ) r ∘ γ + β,  μ = mean(h) or 0,  r = (mean((h − μ)²) + ε)^-½
    program = tl.program_id(0).to(tl.int64)
    b = program // P
    first = (program % P) * steps * BLOCK_T
    column = tl.arange(0, BLOCK_D)
    in_row = column < D
    gamma = _row_of(weight_ptr, b, weight_stride, column, in_row)
    if bias_ptr is not None:
        beta = _row_of(bias_ptr, b, bias_stride, column, in_row)
    for step in tl.range(0, steps, num_stages=STAGES):
        token = first + step * BLOCK_T + tl.arange(0, BLOCK_T)
        live = _live(token, in_row, T, D, BLOCK_D)
        at = (b * T + token)[:, None] * D + column[None, :]
        h = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            h += tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
            rounded = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + at, rounded, mask=live)
            h = rounded.to(tl.float32)
        if mean_ptr is not None:
            mean = tl.sum(h, 1) / D
            tl.store(mean_ptr + b * T + token, mean, mask=token < T)
            h = tl.where(live, h - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(h * h, 1) / D + eps)
        tl.store(rstd_ptr + b * T + token, rstd, mask=token < T)
        y = h * rstd[:, None] * gamma
        if bias_ptr is not None:
            y += beta
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["T", "P", "steps"])
def norm_backward_kernel(
    dy_ptr,  # [B, T, D] in
    dh_ptr,  # [B, T, D] in, or None
    x_ptr,  # [B, T, D] in
    weight_ptr,  # [B, D] in, rows weight_stride apart
    mean_ptr,  # [B, T] in, fp32, or None for RMSNorm
    rstd_ptr,  # [B, T] in, fp32
    dx_ptr,  # [B, T, D] out, x's dtype; added to, if ADD
    dweight_ptr,  # [B, P, D] out
    dbias_ptr,  # [B, P, D] out, or None
    T,
    P,
    steps,
    weight_stride,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    SPREAD: tl.constexpr,
    ADD: tl.constexpr,
):
    # dx = r (g − x̂ mean(g ∘ x̂) − mean(g)) + dh, g = dy ∘ γ;  dγ = Σ_t dy ∘ x̂;  dβ = Σ_t dy
    program = tl.program_id(0).to(tl.int64)
    b = program // P
    first = (program % P) * steps * BLOCK_T
    column = tl.arange(0, BLOCK_D)
    in_row = column < D
    gamma = _row_of(weight_ptr, b, weight_stride, column, in_row)
    dweight = tl.zeros((BLOCK_T if SPREAD else 1, BLOCK_D), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_T if SPREAD else 1, BLOCK_D), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        token = first + step * BLOCK_T + tl.arange(0, BLOCK_T)
        live = _live(token, in_row, T, D, BLOCK_D)
        at = (b * T + token)[:, None] * D + column[None, :]
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        xhat, rstd = _standardise(x, mean_ptr, rstd_ptr, b * T + token, token < T)

        dweight = _add_tokens(dweight, dy * xhat, SPREAD)
        if dbias_ptr is not None:
            dbias = _add_tokens(dbias, dy, SPREAD)
        g = dy * gamma
        if mean_ptr is not None:
            g_xhat, g_mean = tl.split(tl.sum(tl.join(g * xhat, g), 1) / D)
            dx = (g - xhat * g_xhat[:, None] - g_mean[:, None]) * rstd
        else:
            dx = (g - xhat * (tl.sum(g * xhat, 1) / D)[:, None]) * rstd
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + at, mask=live, other=0.0).to(tl.float32)
        if ADD:
            dx += tl.load(dx_ptr + at, mask=live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)
    out = program * D + column
    dtype: tl.constexpr = dweight_ptr.dtype.element_ty
    tl.store(dweight_ptr + out, tl.sum(dweight, 0).to(dtype), mask=in_row)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + out, tl.sum(dbias, 0).to(dtype), mask=in_row)


@triton.jit(do_not_specialize=["T", "P", "steps"])
def norm_double_backward_kernel(
    u_ptr,  # [B, T, D] in, cotangent of dx
    v_ptr,  # [B, D] in, cotangent of dγ, rows v_stride apart
    w_ptr,  # [B, D] in, cotangent of dβ, rows w_stride apart, or None
    dy_ptr,  # [B, T, D] in
    x_ptr,  # [B, T, D] in
    weight_ptr,  # [B, D] in, rows weight_stride apart
    mean_ptr,  # [B, T] in, fp32, or None for RMSNorm
    rstd_ptr,  # [B, T] in, fp32
    cot_dy_ptr,  # [B, T, D] out, x's dtype
    cot_x_ptr,  # [B, T, D] out, x's dtype
    cot_weight_ptr,  # [B, P, D] out
    T,
    P,
    steps,
    v_stride,
    w_stride,
    weight_stride,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    SPREAD: tl.constexpr,
):
    # With Q g = r (g − x̂ mean(g ∘ x̂) − mean(g)), g = dy ∘ γ, dx = Q g:
    #   cot dy = (Q u) ∘ γ + v ∘ x̂ + w;   cot γ = Σ_t (Q u) ∘ dy
    #   cot x  = Q (v ∘ dy − r mean(g ∘ x̂) u − r mean(u ∘ x̂) g) − r x̂ mean(u ∘ dx)
    # with its means taken apart into those of g, u, v ∘ dy and their products: one reduction
    program = tl.program_id(0).to(tl.int64)
    b = program // P
    first = (program % P) * steps * BLOCK_T
    column = tl.arange(0, BLOCK_D)
    in_row = column < D
    gamma = _row_of(weight_ptr, b, weight_stride, column, in_row)
    v = _row_of(v_ptr, b, v_stride, column, in_row)
    cot_weight = tl.zeros((BLOCK_T if SPREAD else 1, BLOCK_D), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        token = first + step * BLOCK_T + tl.arange(0, BLOCK_T)
        live = _live(token, in_row, T, D, BLOCK_D)
        at = (b * T + token)[:, None] * D + column[None, :]
        u = tl.load(u_ptr + at, mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        xhat, rstd = _standardise(x, mean_ptr, rstd_ptr, b * T + token, token < T)

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
        cot_weight = _add_tokens(cot_weight, qu * dy, SPREAD)
        cot_dy = qu * gamma + v * xhat
        if w_ptr is not None:
            cot_dy += _row_of(w_ptr, b, w_stride, column, in_row)
        tl.store(cot_dy_ptr + at, cot_dy.to(cot_dy_ptr.dtype.element_ty), mask=live)
        tl.store(cot_x_ptr + at, cot_x.to(cot_x_ptr.dtype.element_ty), mask=live)
    total = tl.sum(cot_weight, 0).to(cot_weight_ptr.dtype.element_ty)
    tl.store(cot_weight_ptr + program * D + column, total, mask=in_row)


@triton.jit(do_not_specialize=["P"])
def sum_kernel(
    part_ptr,  # [N, P, D] in, fp32
    sum_ptr,  # [N, D] out
    P,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # sum = Σ_p part
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        at = (row * P + p)[:, None] * D + column[None, :]
        total += tl.load(part_ptr + at, mask=(p < P)[:, None] & (column < D)[None, :], other=0.0)
    out = tl.sum(total, 0).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + row * D + column, out, mask=column < D)
