"""How exact a pass of an op is: next to PyTorch's own error in the same dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


def relative_error(value: Tensor, gold: Tensor) -> float:
    return float(((value.double() - gold).norm() / gold.norm()).detach())


def assert_at_most_twice_eager(
    names: str, kernel: tuple[Any, ...], eager: tuple[Any, ...], gold: tuple[Any, ...]
) -> None:
    for name, fast, plain, exact in zip(names.split(), kernel, eager, gold, strict=True):
        assert (fast is None) == (plain is None), name
        if fast is None:
            continue
        assert (fast.shape, fast.dtype) == (plain.shape, plain.dtype), name
        ours, theirs = relative_error(fast, exact), relative_error(plain, exact)
        floor = FLOOR[fast.dtype]
        assert ours <= 2 * theirs + floor, f"{name}: kernel {ours:.2e}, eager {theirs:.2e}"
