"""Triton's kernels of norm, SwiGLU, GELU and rotary embedding, in its interpreter, against the
plain passes in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gdprompt_fast.ops import backend
from gdprompt_fast.ops.eager import gelu as eager_gelu
from gdprompt_fast.ops.eager import norm as eager_norm
from gdprompt_fast.ops.eager import rotary as eager_rotary
from gdprompt_fast.ops.eager import swiglu as eager_swiglu
from gdprompt_fast.ops.gelu import gelu
from gdprompt_fast.ops.norm import add_norm, norm
from gdprompt_fast.ops.rotary import rotary
from gdprompt_fast.ops.swiglu import swiglu
from helpers.backends import only_kernels
from helpers.passes import (
    assert_at_most_twice_eager,
    assert_norm_keeps_dtypes,
    assert_norm_of_nothing_is_empty,
    assert_norm_takes_strided_inputs,
    check_norm,
    relative_error,
    widen,
)

pytest.importorskip("triton", reason="the kernels need Triton")
from gdprompt_fast.kernels import gelu as kernel_gelu
from gdprompt_fast.kernels import norm as kernel_norm
from gdprompt_fast.kernels import rotary as kernel_rotary
from gdprompt_fast.kernels import swiglu as kernel_swiglu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    only_kernels(monkeypatch, "norm", "swiglu", "gelu", "rotary")


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens to a program of a norm."""
    for launches in kernel_norm.LAUNCHES.values():
        for most, launch in launches.items():
            monkeypatch.setitem(launches, most, launch._replace(programs=4))


@each_dtype
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("expanded", [True, False], ids=["one-weight-row", "row-of-each-example"])
@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 41), (3, 5, 401), (2, 3, 2, 8), (3, 7), (1, 130, 32)], ids=str
)
def test_every_pass_of_norm_errs_at_most_twice_as_much_as_eager(
    shape: tuple[int, ...], center: bool, expanded: bool, dtype: torch.dtype
) -> None:
    check_norm(kernel_norm, eager_norm, shape, center, expanded, dtype)


@each_dtype
@pytest.mark.parametrize("shape", [(3, 401), (1, 1), (2, 5, 308)], ids=str)
def test_every_pass_of_swiglu_errs_at_most_twice_as_much_as_eager(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    gate, up, dy, a, b = ((2 * torch.randn(shape)).to(dtype) for _ in range(5))
    for pass_, names, inputs in (
        ("swiglu_forward", "y", (gate, up)),
        ("swiglu_backward", "dgate dup", (dy, gate, up)),
        ("swiglu_double_backward", "cot_dy cot_gate cot_up", (a, b, dy, gate, up)),
    ):
        fast, plain = getattr(kernel_swiglu, pass_), getattr(eager_swiglu, pass_)
        results = [fast(*inputs), plain(*inputs), plain(*widen(inputs))]
        if pass_ == "swiglu_forward":
            results = [(y,) for y in results]
        assert_at_most_twice_eager(names, *results)


def test_swiglu_of_large_gates_is_finite() -> None:
    gate = torch.tensor([-200.0, -90.0, 90.0, 200.0])
    ones = torch.ones(4)
    results = kernel_swiglu.swiglu_double_backward(ones, ones, ones, gate, ones)
    expected = eager_swiglu.swiglu_double_backward(ones, ones, ones, gate, ones)
    torch.testing.assert_close(results, expected)


@each_dtype
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(3, 401), (1, 1), (2, 5, 308)], ids=str)
def test_every_pass_of_gelu_errs_at_most_twice_as_much_as_eager(
    shape: tuple[int, ...], approximate: str, dtype: torch.dtype
) -> None:
    x, dy, a = ((2 * torch.randn(shape)).to(dtype) for _ in range(3))
    for pass_, names, inputs in (
        ("gelu_forward", "y", (x, approximate)),
        ("gelu_backward", "dx", (dy, x, approximate)),
        ("gelu_double_backward", "cot_dy cot_x", (a, dy, x, approximate)),
    ):
        fast, plain = getattr(kernel_gelu, pass_), getattr(eager_gelu, pass_)
        results = [fast(*inputs), plain(*inputs), plain(*widen(inputs))]
        if pass_ != "gelu_double_backward":
            results = [(only,) for only in results]
        assert_at_most_twice_eager(names, *results)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_large_inputs_is_finite(approximate: str) -> None:
    x = torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4])
    ones = torch.ones(6)
    for kernel, eager in (
        (kernel_gelu.gelu_forward, eager_gelu.gelu_forward),
        (kernel_gelu.gelu_backward, eager_gelu.gelu_backward),
        (kernel_gelu.gelu_double_backward, eager_gelu.gelu_double_backward),
    ):
        inputs = (ones, ones, x)[-kernel.__code__.co_argcount + 1 :]
        torch.testing.assert_close(kernel(*inputs, approximate), eager(*inputs, approximate))


def rotary_inputs(
    shape: tuple[int, ...], rotated: int, tables: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """q and k with a gap behind every head, [B, T, H, D] in memory, and tables of unequal
    halves.
    """
    B, H, K, T, D = shape
    q, k = (torch.randn(B, T, n, D + 2).to(dtype)[..., :D].transpose(1, 2) for n in (H, K))
    angle = torch.randn(tables, T, rotated)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


@each_dtype
@pytest.mark.parametrize(
    ("shape", "rotated", "tables"),
    [
        ((2, 4, 2, 3, 8), 8, 1),
        ((3, 5, 1, 1, 20), 20, 3),  # one token; neither the heads nor their size a power of two
        ((2, 3, 3, 5, 14), 6, 2),  # the rest of each head is passed on
        ((1, 37, 1, 2, 6), 2, 1),  # more heads than one tile takes
    ],
    ids=["grouped-heads", "odd", "partial", "many-heads"],
)
def test_every_pass_of_rotary_errs_at_most_twice_as_much_as_eager(
    shape: tuple[int, ...],
    rotated: int,
    tables: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_rotary, "TILE_ELEMENTS", 16)
    inputs = rotary_inputs(shape, rotated, tables, dtype)
    for pass_ in ("rotary_forward", "rotary_backward"):
        fast, plain = getattr(kernel_rotary, pass_), getattr(eager_rotary, pass_)
        assert_at_most_twice_eager("q k", fast(*inputs), plain(*inputs), plain(*widen(inputs)))


def test_rotary_of_any_strides_is_the_same_and_token_major() -> None:
    q, k, cos, sin = rotary_inputs((2, 3, 2, 4, 6), 6, 1, torch.float32)
    expected = eager_rotary.rotary_backward(q, k, cos, sin)
    odd = q.transpose(0, 3).contiguous().transpose(0, 3)  # the last dimension is not contiguous
    got = kernel_rotary.rotary_backward(odd, k.contiguous(), cos.expand(2, -1, -1), sin)
    torch.testing.assert_close(got, expected)
    assert all(t.transpose(1, 2).is_contiguous() for t in got)
    one = torch.ones(()).expand(2, 3, 4, 6)  # as the gradient of a sum is
    torch.testing.assert_close(
        kernel_rotary.rotary_backward(one, k, cos, sin),
        eager_rotary.rotary_backward(one.contiguous(), k, cos, sin),
    )


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    assert_norm_takes_strided_inputs(kernel_norm, eager_norm)
    gate, up = torch.randn(3, 8).chunk(2, -1)
    scalar = torch.randn(()).expand(3, 4)
    torch.testing.assert_close(
        kernel_swiglu.swiglu_backward(scalar, gate, up),
        eager_swiglu.swiglu_backward(scalar, gate, up),
    )
    torch.testing.assert_close(
        kernel_gelu.gelu_backward(scalar, gate, "none"),
        eager_gelu.gelu_backward(scalar, gate, "none"),
    )


def test_norm_in_fp32_of_bf16_weights_keeps_the_dtype_of_each() -> None:
    assert_norm_keeps_dtypes(kernel_norm, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)], ids=["no-examples", "no-tokens"])
def test_empty_inputs_give_empty_results_and_sums_of_zero(shape: tuple[int, ...]) -> None:
    assert_norm_of_nothing_is_empty(kernel_norm, shape)
    x = torch.randn(shape)
    assert kernel_swiglu.swiglu_forward(x, x).shape == shape
    assert kernel_gelu.gelu_forward(x, "tanh").shape == shape
    heads, table = x[:, None], torch.ones(1, *shape[1:])
    assert kernel_rotary.rotary_forward(heads, heads, table, table)[0].shape == heads.shape


def test_a_row_too_long_for_the_registers_is_refused_by_name() -> None:
    x = torch.zeros(1, 1, kernel_norm.MAX_D + 1)
    with pytest.raises(ValueError, match="x: expected at most 16384 elements in a row, got 16385"):
        kernel_norm.norm_forward(x, x[0], None, 1e-5, False)


def derivatives(op: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The value, the first derivatives and those of a function of them."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    generator = torch.Generator().manual_seed(1)

    def like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t.dtype)

    y = op(*leaves)
    first = torch.autograd.grad(y, leaves, like(y), create_graph=True)
    second = torch.autograd.grad(sum((g * like(g)).sum() for g in first) + y.square().sum(), leaves)
    return [y, *first, *second]


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (lambda x, w: norm(x, w, None, eps=1e-5, center=False), [(3, 5, 41), (3, 41)]),
        (lambda x, w: norm(x, w.expand(3, 8), None, eps=1e-5, center=False), [(3, 2, 4, 8), (8,)]),
        (lambda x, w, b: norm(x, w, b, eps=1e-5, center=True), [(3, 5, 41), (3, 41), (3, 41)]),
        (
            lambda x, r, w: sum(add_norm(x, r, w, None, eps=1e-5, center=False)),
            [(3, 5, 41), (3, 5, 41), (3, 41)],
        ),
        (swiglu, [(3, 5, 41), (3, 5, 41)]),
        (gelu, [(3, 5, 41)]),
        (lambda x: gelu(x, "tanh"), [(3, 5, 41)]),
    ],
    ids=[
        "rms_norm",
        "rms_norm-of-heads-one-weight",
        "layer_norm",
        "add_norm",
        "swiglu",
        "gelu",
        "gelu-tanh",
    ],
)
def test_first_and_second_derivatives_through_the_kernels_equal_fp64(
    op: Callable[..., Tensor], shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [torch.randn(shape) for shape in shapes]
    gold = derivatives(op, *(t.double() for t in inputs))
    used = set()

    def watch(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def watched(*args: Any) -> Any:
            used.add(name.removeprefix("add_").partition("_")[2])
            return plain(*args)

        monkeypatch.setattr(module, name, watched)

    for pass_ in ("forward", "backward", "double_backward"):
        watch(kernel_norm, f"norm_{pass_}")
        watch(kernel_swiglu, f"swiglu_{pass_}")
        watch(kernel_gelu, f"gelu_{pass_}")
    watch(kernel_norm, "add_norm_forward")
    with backend.use_backend("triton"):
        values = derivatives(op, *inputs)
    assert used == {"forward", "backward", "double_backward"}
    for index, (value, exact) in enumerate(zip(values, gold, strict=True)):
        assert relative_error(value, exact) < 1e-5, index


@pytest.mark.usefixtures("on_triton")
def test_first_and_second_derivatives_through_rotary_equal_fp64() -> None:
    q, k, cos, sin = rotary_inputs((2, 3, 1, 5, 8), 6, 1, torch.float32)

    def op(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(rotary(q, k, cos.to(q.dtype), sin.to(q.dtype)), 1)

    gold = derivatives(op, q.double(), k.double())
    with backend.use_backend("triton"):
        values = derivatives(op, q, k)
    for index, (value, exact) in enumerate(zip(values, gold, strict=True)):
        assert relative_error(value, exact) < 1e-5, index
