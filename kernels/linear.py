"""The fused inner update: a product with every group's own weights, in one accumulator and one
write.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


# Sizes that change from batch to batch are not specialised on, here and in the other kernels: each
# value would compile again.
@triton.jit(do_not_specialize=["ROWS", "M"])
def _updated_product_kernel(
    x_ptr,  # [G·M, I] in
    w_ptr,  # [O, I] in, any strides
    b_ptr,  # [O] in, if HAS_BIAS
    a_ptr,  # [G·M, S] in, x's dtype: scale · (x Xᵀ + 1)
    e_ptr,  # [G, S, O] in
    y_ptr,  # [G·M, O] out, x's dtype
    ROWS,
    M,
    I,
    O,
    S,
    stride_wo,
    stride_wi,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # y[r, o] = Σ_i x[r, i] w[o, i] + b[o] + Σ_s a[r, s] e[r // M, s, o]
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    r = first_row + tl.arange(0, BLOCK_R)
    o = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    in_r, in_o = r < ROWS, o < O
    acc = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.float32)
    for start in range(0, I, BLOCK_K):
        i = start + k
        x = tl.load(
            x_ptr + r[:, None] * I + i[None, :], mask=in_r[:, None] & (i < I)[None, :], other=0.0
        )
        w = tl.load(
            w_ptr + o[None, :] * stride_wo + i[:, None] * stride_wi,
            mask=in_o[None, :] & (i < I)[:, None],
            other=0.0,
        )
        acc = tl.dot(x, w, acc, input_precision=precision)
    last_group = (tl.minimum(first_row + BLOCK_R, ROWS) - 1) // M
    for step in range(0, GROUPS):  # a block of rows meets this many groups at most
        group = first_row // M + step
        if group <= last_group:
            mine = in_r & (r // M == group)
            for start in range(0, S, BLOCK_K):
                s = start + k
                a = tl.load(
                    a_ptr + r[:, None] * S + s[None, :],
                    mask=mine[:, None] & (s < S)[None, :],
                    other=0.0,
                )
                e = tl.load(
                    e_ptr + (group * S + s[:, None]) * O + o[None, :],
                    mask=(s < S)[:, None] & in_o[None, :],
                    other=0.0,
                )
                acc = tl.dot(a, e, acc, input_precision=precision)
    if HAS_BIAS:
        acc += tl.load(b_ptr + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + r[:, None] * O + o[None, :], y, mask=in_r[:, None] & in_o[None, :])


def _blocks(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes that fill the matrix units without spilling (benchmarks/compile_kernels.py)."""
    wide = dtype == torch.float32
    return dict(BLOCK_R=64, BLOCK_O=64 if wide else 128, BLOCK_K=32 if wide else 64)


def updated_product(
    x_GMI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    match_GMS: Tensor,
    factor_GSO: Tensor,
    scale: float,
) -> Tensor:
    """y = x Wᵀ + b + scale · match · E of every group, [G, M, O]."""
    groups, rows, inputs = x_GMI.shape
    outputs, context = weight_OI.shape[0], factor_GSO.shape[1]
    y = x_GMI.new_empty(groups, rows, outputs)
    blocks = _blocks(x_GMI.dtype)
    grid = (triton.cdiv(groups * rows, blocks["BLOCK_R"]), triton.cdiv(outputs, blocks["BLOCK_O"]))
    with torch.cuda.device_of(x_GMI):
        _updated_product_kernel[grid](
            x_GMI.contiguous(),
            weight_OI,
            bias_O if bias_O is not None else y,
            (match_GMS if scale == 1.0 else match_GMS * scale).contiguous(),
            factor_GSO.contiguous(),
            y,
            groups * rows,
            rows,
            inputs,
            outputs,
            context,
            weight_OI.stride(0),
            weight_OI.stride(1),
            HAS_BIAS=bias_O is not None,
            EXACT=x_GMI.dtype == torch.float32,
            GROUPS=triton.next_power_of_2((blocks["BLOCK_R"] - 1) // rows + 2),
            **blocks,
            num_warps=4,
            num_stages=3,
        )
    return y


def compile_cases(_target: str) -> list[dict[str, Any]]:
    """What benchmarks/compile_kernels.py compiles: a layer of Llama 3.2 1B in bf16 and fp32."""
    sizes = ("ROWS", "M", "I", "O", "S", "stride_wo")
    pointers = ("x_ptr", "w_ptr", "b_ptr", "a_ptr", "e_ptr", "y_ptr")
    cases = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        exact = dtype == torch.float32
        flags = dict(HAS_BIAS=False, EXACT=exact, GROUPS=2, stride_wi=1)
        cases.append(
            dict(
                name=f"updated_product {name}",
                kernel=_updated_product_kernel,
                signature={**dict.fromkeys(pointers, f"*{name}"), **dict.fromkeys(sizes, "i32")},
                constexprs={**flags, **_blocks(dtype)},
                aligned=[size for size in sizes if size not in ("ROWS", "M")],
                num_warps=4,
                num_stages=3,
            )
        )
    return cases
