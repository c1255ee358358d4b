"""What elementwise kernels share: a program's part of flattened tensors, and the launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import run_kernel
from .sizes import cdiv

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def flat(n, BLOCK: tl.constexpr):
    # the elements of this program, and which of them are there
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < n


@triton.jit
def load(ptr, at, live):
    return tl.load(ptr + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, at, live, value):
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=live)


def launch(
    kernel: Any,
    outputs: int,
    *inputs: Tensor,
    like: Tensor,
    into: tuple[Tensor, ...] | None = None,
    **constants: Any,
) -> tuple[Tensor, ...]:
    """Runs ``kernel(*inputs, *outputs, n, BLOCK, **constants)``; its outputs are ``into``, or
    ``like`` one input.
    """
    n = like.numel()
    out = into or tuple(
        torch.empty(like.shape, dtype=like.dtype, device=like.device) for _ in range(outputs)
    )
    dense = [t.contiguous() for t in inputs]
    run_kernel(
        kernel,
        (cdiv(n, BLOCK),),
        *dense,
        *out,
        n,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **constants,
    )
    return out
