"""The ops in C++ against the plain passes in fp64, next to PyTorch's error in the same dtype."""

from __future__ import annotations

from importlib import import_module
from inspect import isfunction, signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gdprompt_fast.ops import backend
from gdprompt_fast.ops.attention import visible_keys
from gdprompt_fast.ops.cpp import attention as cpp_attention
from gdprompt_fast.ops.cpp import gelu as cpp_gelu
from gdprompt_fast.ops.cpp import norm as cpp_norm
from gdprompt_fast.ops.cpp import rotary as cpp_rotary
from gdprompt_fast.ops.cpp import swiglu as cpp_swiglu
from gdprompt_fast.ops.cpp import vocabulary as cpp_vocabulary
from gdprompt_fast.ops.eager import attention as eager_attention
from gdprompt_fast.ops.eager import gelu as eager_gelu
from gdprompt_fast.ops.eager import norm as eager_norm
from gdprompt_fast.ops.eager import rotary as eager_rotary
from gdprompt_fast.ops.eager import swiglu as eager_swiglu
from gdprompt_fast.ops.eager import vocabulary as eager_vocabulary
from gdprompt_fast.testing.gates import relative_error
from helpers.passes import (
    assert_norm_keeps_dtypes,
    assert_norm_of_nothing_is_empty,
    assert_norm_takes_strided_inputs,
    check,
    check_norm,
    widen,
)

pytestmark = pytest.mark.usefixtures("cpp", "poisoned_empty")
DTYPES = torch.float32, torch.bfloat16, torch.float64
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp64"])


@each_dtype
@pytest.mark.parametrize("expanded", [True, False], ids=["one-weight-row", "row-of-each-example"])
@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 41), (3, 5, 401), (2, 3, 2, 8), (3, 7), (1, 130, 32), (2, 65, 3)], ids=str
)
def test_every_pass_of_norm_errs_at_most_twice_as_much_as_pytorch(
    shape: tuple[int, ...], center: bool, expanded: bool, dtype: torch.dtype
) -> None:
    check_norm(cpp_norm, eager_norm, shape, center, expanded, dtype)


@each_dtype
@pytest.mark.parametrize("shape", [(3, 401), (1, 1), (2, 5, 308), (2, 3, 20000)], ids=str)
def test_every_pass_of_swiglu_errs_at_most_twice_as_much_as_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    gate, up, dy, a, b = ((2 * torch.randn(shape)).to(dtype) for _ in range(5))
    check("swiglu_forward", cpp_swiglu, eager_swiglu, (gate, up))
    check("swiglu_backward", cpp_swiglu, eager_swiglu, (dy, gate, up))
    check("swiglu_double_backward", cpp_swiglu, eager_swiglu, (a, b, dy, gate, up))


@each_dtype
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("shape", [(3, 401), (1, 1), (2, 3, 20000)], ids=str)
def test_every_pass_of_gelu_errs_at_most_twice_as_much_as_pytorch(
    shape: tuple[int, ...], approximate: str, dtype: torch.dtype
) -> None:
    x, dy, a = ((2 * torch.randn(shape)).to(dtype) for _ in range(3))
    check("gelu_forward", cpp_gelu, eager_gelu, (x, approximate))
    check("gelu_backward", cpp_gelu, eager_gelu, (dy, x, approximate))
    check("gelu_double_backward", cpp_gelu, eager_gelu, (a, dy, x, approximate))


@each_dtype
@pytest.mark.parametrize("rotated", [20, 6], ids=["whole-heads", "part-of-each-head"])
@pytest.mark.parametrize("tables", [1, 3], ids=["shared-positions", "positions-of-each-row"])
def test_rotary_errs_at_most_twice_as_much_as_pytorch(
    tables: int, rotated: int, dtype: torch.dtype
) -> None:
    q, k = (torch.randn(3, 7, heads, 20).to(dtype).transpose(1, 2) for heads in (4, 2))
    cos, sin = (torch.randn(tables, 7, rotated).to(dtype) for _ in range(2))
    check("rotary_forward", cpp_rotary, eager_rotary, (q, k, cos, sin))
    check("rotary_backward", cpp_rotary, eager_rotary, (q, k.contiguous(), cos, sin))


# batch, heads, key/value heads, tokens, head dim, window, segments
ATTENTION = {
    "one token": (2, 2, 1, 1, 16, None, False),
    "17 tokens, head dim 20": (2, 4, 2, 17, 20, None, False),
    "48 tokens, two to each window": (1, 2, 2, 48, 16, 2, False),
    "131 tokens, 3 heads on 1, window 40": (1, 3, 1, 131, 64, 40, False),
    "131 packed tokens": (2, 4, 4, 131, 80, None, True),
    "131 packed tokens, window 5": (2, 2, 1, 131, 32, 5, True),
}


@each_dtype
@pytest.mark.parametrize("sharpness", [1, 8], ids=["even-scores", "sharp-scores"])
@pytest.mark.parametrize("case", ATTENTION)
def test_every_pass_of_attention_errs_at_most_twice_as_much_as_pytorch(
    case: str, sharpness: int, dtype: torch.dtype
) -> None:
    B, H, K, T, D, window, packed = ATTENTION[case]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    q, k = (
        sharpness * draw(B, T, H, D).transpose(1, 2),
        draw(B, T, K, 2 * D)[..., D:].transpose(1, 2),
    )
    v, dout = draw(B, K, D, T).transpose(2, 3), draw(B, T, H, D)
    dots = draw(B, H, T, D), draw(B, T, K, D).transpose(1, 2), draw(B, K, T, D)
    segments = torch.randint(9, (B, 9)).repeat_interleave(-(-T // 9), 1)[:, :T] if packed else None
    options = D**-0.5, visible_keys(q, window, segments)
    results = check("attention_forward", cpp_attention, eager_attention, (q, k, v, *options))
    saved = [(*result, *options) for result in results]
    inputs = (dout, q, k, v)
    check("attention_backward", cpp_attention, eager_attention, (dout, None, q, k, v), saved)
    check("attention_double_backward", cpp_attention, eager_attention, (*dots, *inputs), saved)


@each_dtype
def test_attention_to_one_key_has_gradients_of_exactly_zero(dtype: torch.dtype) -> None:
    B, H, K, T, D = 2, 4, 2, 37, 20
    q, k, v, dout, *dots = (
        torch.randn(B, heads, T, D).to(dtype) for heads in (H, K, K, H, H, K, K)
    )
    dout, options = dout.transpose(1, 2), (D**-0.5, visible_keys(q, window=1))
    kept = q, k, v, *cpp_attention.attention_forward(q, k, v, *options), *options
    dq, dk, dv = cpp_attention.attention_backward(dout, None, *kept)
    cotangents = cpp_attention.attention_double_backward(*dots, dout, *kept)
    cot_dout, cot_q, cot_k, cot_v = cotangents
    for zero in (dq, dk, cot_q, cot_k, cot_v):
        assert torch.equal(zero, torch.zeros_like(zero))
    assert torch.equal(cot_dout, dots[2].repeat_interleave(H // K, 1).transpose(1, 2))
    torch.testing.assert_close(dv, dout.transpose(1, 2).unflatten(1, (K, -1)).sum(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_of_rows_with_nearly_one_key_keep_their_digits(dtype: torch.dtype) -> None:
    k, v, dout = (torch.randn(1, 1, 40, 16) for _ in range(3))
    k = k / k.norm(dim=-1, keepdim=True)  # scores: 40 at the own key, < 30 elsewhere
    q, k, v, dout = (t.to(dtype) for t in (40 * k, k, v, dout))
    inputs, options = (dout.transpose(1, 2), q, k, v), (1.0, None)
    fast, gold = (
        module.attention_backward(
            t[0], None, *t[1:], *module.attention_forward(*t[1:], *options), *options
        )[0]
        for module, t in ((cpp_attention, inputs), (eager_attention, widen(inputs)))
    )
    assert relative_error(fast, gold) < (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("z_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
    ids=["fp32", "bf16", "fp32-to-bf16", "fp64"],
)
@pytest.mark.parametrize("shape", [(3, 7, 401), (2, 1, 1), (1, 5, 20000)], ids=str)
def test_every_pass_of_the_vocabulary_errs_at_most_twice_as_much_as_pytorch(
    shape: tuple[int, int, int], z_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    (G, N, v), first = shape, 5
    whole = (3 * torch.randn(G, N, v + 9)).to(z_dtype)
    z, b_bar = (3 * torch.randn(shape)).to(z_dtype), torch.randn(shape).to(z_dtype)
    teacher_z = whole[..., 4 : 4 + v]  # a block of given logits, of which some are excluded
    teacher_z[..., 1::7] = float("-inf")
    statistics = torch.promote_types(z_dtype, torch.float32)
    top, total, value, weight = (torch.rand(G, N, dtype=statistics) for _ in range(4))
    lse, both = total + 6, (torch.cat([top, total], 1), torch.cat([total, top], 1))
    ids = torch.randint(-1, v + 2 * first, (G, N))

    def compare(name: str, *inputs: Any) -> Any:
        def plain(*given: Any) -> Any:  # may overwrite what it is given
            own = (t.clone() if isinstance(t, Tensor) else t for t in given)
            return getattr(eager_vocabulary, name)(*own)

        return check(name, cpp_vocabulary, SimpleNamespace(**{name: plain}), inputs)

    compare("online_softmax", z, ids, first, dtype, top, total, value)
    compare("online_kl", z, teacher_z, dtype, *both, value)
    b, *_ = compare("softmax_minus_one_hot", z, lse, dtype, ids, first)
    compare("softmax_difference", z, lse, dtype, teacher_z, lse.exp())
    compare("logit_cotangent", b_bar, b, b.dtype, value, weight, ids, first)
    share = torch.randn(shape).to(dtype)
    sums = [torch.ones(shape, dtype=statistics) for _ in range(2)]
    for passes, total_GNX in zip((cpp_vocabulary, eager_vocabulary), sums, strict=True):
        assert passes.accumulate_(total_GNX, share, top) is total_GNX
    torch.testing.assert_close(*sums)


def test_an_argument_of_another_dtype_or_shape_is_named() -> None:
    x, half = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16()
    with pytest.raises(RuntimeError, match=r"up: expected Float \[2, 3, 8\], got BFloat16"):
        cpp_swiglu.swiglu_forward(x, half)
    with pytest.raises(RuntimeError, match=r"up: expected Float \[2, 3, 8\], got Float \[2, 8\]"):
        cpp_swiglu.swiglu_forward(x, x[:, 0])
    q = x[:, None]
    with pytest.raises(RuntimeError, match=r"k: expected Float \[2, 1, 3, 8\], got BFloat16"):
        cpp_attention.attention_forward(q, half[:, None], q, 1.0, None)
    with pytest.raises(RuntimeError, match="k: expected a divisor of 1 heads, got 2"):
        two = q.expand(-1, 2, -1, -1)
        cpp_attention.attention_forward(q, two, two, 1.0, None)


@each_dtype
def test_swiglu_of_large_gates_is_finite_and_of_nan_is_nan(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4], dtype=dtype)
    ones = torch.ones_like(gate)
    torch.testing.assert_close(
        cpp_swiglu.swiglu_double_backward(ones, ones, ones, gate, ones),
        eager_swiglu.swiglu_double_backward(ones, ones, ones, gate, ones),
    )
    assert cpp_swiglu.swiglu_forward(gate.fill_(torch.nan), ones).isnan().all()


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    assert_norm_takes_strided_inputs(cpp_norm, eager_norm)
    gate, up = torch.randn(3, 8).chunk(2, -1)
    scalar = torch.randn(()).expand(3, 4)
    torch.testing.assert_close(
        cpp_swiglu.swiglu_backward(scalar, gate, up),
        eager_swiglu.swiglu_backward(scalar, gate, up),
    )


def test_norm_of_bf16_with_weights_in_fp32_keeps_the_dtype_of_each() -> None:
    assert_norm_keeps_dtypes(cpp_norm, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)], ids=["no-examples", "no-tokens"])
def test_empty_inputs_give_empty_results_and_sums_of_zero(shape: tuple[int, ...]) -> None:
    assert_norm_of_nothing_is_empty(cpp_norm, shape)
    x = torch.randn(shape)
    assert cpp_swiglu.swiglu_forward(x, x).shape == shape


def test_results_are_the_same_with_any_number_of_threads() -> None:
    x, weight = torch.randn(3, 500, 64), torch.randn(3, 64)
    y, mean, rstd = cpp_norm.norm_forward(x, weight, None, 1e-5, True)
    one = cpp_norm.norm_backward(y, None, None, True, x, weight, mean, rstd)
    torch.set_num_threads(2)
    try:
        two = cpp_norm.norm_backward(y, None, None, True, x, weight, mean, rstd)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_every_op_in_cpp_has_the_passes_of_its_namesake_in_pytorch() -> None:
    for op in backend.CPP:
        fast, plain = (import_module(f"gdprompt_fast.ops.{b}.{op}") for b in ("cpp", "eager"))
        passes = {
            name: signature(value)
            for name, value in vars(plain).items()
            if isfunction(value) and value.__module__ == plain.__name__ and name[0] != "_"
        }
        assert passes == {name: signature(getattr(fast, name)) for name in passes}
