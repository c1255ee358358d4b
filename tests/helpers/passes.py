"""The passes of a backend against those in PyTorch: the gate of testing/gates.py on every output,
by name, and what a norm has to keep to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdprompt_fast.testing import gates
from gdprompt_fast.testing.gates import relative_error, widened

FLOOR = {**gates.FLOOR, torch.float64: 1e-12}


def widen(values: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of a pass for its run in fp64."""
    return tuple(map(widened, values))


def assert_at_most_twice_eager(
    names: str | Sequence[str], fast: Sequence[Any], eager: Sequence[Any], gold: Sequence[Any]
) -> None:
    names = names.split() if isinstance(names, str) else names
    for name, ours, theirs, exact in zip(names, fast, eager, gold, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is None:
            continue
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        error, plain = relative_error(ours, exact), relative_error(theirs, exact)
        assert error <= 2 * plain + FLOOR[ours.dtype], f"{name}: {error:.2e}, eager {plain:.2e}"


def check(
    name: str, fast: Any, eager: Any, inputs: tuple[Any, ...], saved: Any = ((), (), ())
) -> tuple[Any, Any, Any]:
    """Runs a pass of two modules and in fp64, compares, and returns what the three gave.

    ``saved`` is what the forward pass of each left for this one.
    """
    got = getattr(fast, name)(*inputs, *saved[0])
    plain = getattr(eager, name)(*inputs, *saved[1])
    gold = getattr(eager, name)(*widen(inputs), *saved[2])
    results = [(r,) if isinstance(r, Tensor) else r for r in (got, plain, gold)]
    names = [f"{name}, result {i}" for i in range(len(results[0]))]
    assert_at_most_twice_eager(names, *results)
    return got, plain, gold


def rows(B: int, D: int, dtype: torch.dtype, expanded: bool) -> Tensor:
    """[B, D] of γ's size: of one row with a stride of 0, or with a gap between the rows."""
    if expanded:
        return (1 + 0.3 * torch.randn(D)).to(dtype).expand(B, D)
    return (1 + 0.3 * torch.randn(B, D + 3)).to(dtype)[:, :D]


def check_norm(
    fast: Any, eager: Any, shape: tuple[int, ...], center: bool, expanded: bool, dtype: torch.dtype
) -> None:
    """Every pass of a norm, alone and after a sum."""
    B, D = shape[0], shape[-1]
    x = (torch.randn(shape) * 2 + 0.5).to(dtype)
    dy, u = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, v, w = (rows(B, D, dtype, expanded) for _ in range(3))
    bias = rows(B, D, dtype, expanded) if center else None
    results = check("norm_forward", fast, eager, (x, weight, bias, 1e-5, center))
    kept = [result[1:] for result in results]
    check("norm_backward", fast, eager, (dy, None, None, True, x, weight), kept)
    check("norm_double_backward", fast, eager, (u, v, w, dy, x, weight), kept)

    results = check("add_norm_forward", fast, eager, (x, u, weight, bias, 1e-5, center))
    h = results[1][0]
    assert torch.equal(results[0][0], h)
    kept = [result[2:] for result in results]
    for with_bias in (False, True):
        check("norm_backward", fast, eager, (dy, u, None, with_bias, h, weight), kept)
    check("norm_double_backward", fast, eager, (u, v, None, dy, h, weight), kept)


def assert_norm_keeps_dtypes(fast: Any, of_x: torch.dtype, of_weight: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 8).to(of_x), torch.randn(2, 8).to(of_weight)
    y, mean, rstd = fast.norm_forward(x, weight, None, 1e-5, False)
    dx, dweight, dbias = fast.norm_backward(y, None, None, True, x, weight, mean, rstd)
    assert (y.dtype, dx.dtype) == (of_x, of_x)
    assert (dweight.dtype, dbias.dtype) == (of_weight, of_weight)


def assert_norm_takes_strided_inputs(fast: Any, eager: Any) -> None:
    x, dy, u = (torch.randn(2, 6, 5, 4).transpose(1, 3) for _ in range(3))
    weight, v, w = (torch.randn(6, 2).t() for _ in range(3))
    _, mean, rstd = fast.norm_forward(x, weight, None, 1e-5, True)
    inputs = (u, v, w, dy, x, weight, mean, rstd)
    expected = eager.norm_double_backward(*inputs)
    torch.testing.assert_close(fast.norm_double_backward(*inputs), expected)


def assert_norm_of_nothing_is_empty(fast: Any, shape: tuple[int, ...]) -> None:
    """And its sums over tokens are zero."""
    x, weight = torch.randn(shape), torch.randn(shape[0], 8)
    y, mean, rstd = fast.norm_forward(x, weight, weight, 1e-5, True)
    kept = x, weight, mean, rstd
    dx, dweight, dbias = fast.norm_backward(y, None, None, True, *kept)
    cot_dy, cot_x, cot_weight = fast.norm_double_backward(dx, dweight, dbias, y, *kept)
    assert y.shape == dx.shape == cot_dy.shape == cot_x.shape == shape
    for total in (dweight, dbias, cot_weight):
        torch.testing.assert_close(total, torch.zeros(shape[0], 8))
