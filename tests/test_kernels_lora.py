"""The low-rank kernels in Triton, under its interpreter, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from gdprompt_fast.kernels import lora as kernels
from gdprompt_fast.ops.eager import lora as eager
from gdprompt_fast.rows import GroupedRows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
ROWS = {
    "one-each": ([0, 1, 2], 3),
    "ragged-and-an-empty-group": ([3, 0, 3, 1, 3], 4),
    "one-group": ([0, 0], 1),
}
SHAPES = [(1, 16, 1), (1, 1, 16), (7, 41, 1), (5, 3, 70), (13, 131, 3), (70, 16, 16), (2, 33, 67)]

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-I{}-O{}".format(*s))
each_view = pytest.mark.parametrize("transposed", [False, True], ids=["weight-OI", "weight-IO"])


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: an element that no kernel writes shows."""
    torch.manual_seed(0)
    plain = torch.Tensor.new_empty

    def poisoned(self: Tensor, *size: int, **options: Any) -> Tensor:
        fresh = plain(self, *size, **options)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def assert_at_most_twice_eager(pass_: str, *inputs: Any) -> None:
    wide = tuple(t.double() if isinstance(t, Tensor) else t for t in inputs)
    plain, exact = getattr(eager, pass_)(*inputs), getattr(eager, pass_)(*wide)
    got = getattr(kernels, pass_)(*inputs)
    assert (got.shape, got.dtype) == (plain.shape, plain.dtype)
    ours, theirs = relative_error(got, exact), relative_error(plain, exact)
    assert ours <= 2 * theirs + FLOOR[got.dtype], f"error {ours:.1e}, of PyTorch {theirs:.1e}"


def weights(
    groups: int, shape: tuple[int, ...], transposed: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """W and every group's W', also as views of what is stored the other way round."""
    _, inputs, outputs = shape
    if transposed:
        weight, change = torch.randn(inputs, outputs).T, torch.randn(groups, inputs, outputs).mT
    else:
        weight, change = torch.randn(outputs, inputs), torch.randn(groups, outputs, inputs)
    weight = weight.to(dtype)
    return weight, weight.float() + change


@each_dtype
@each_rows
@each_shape
@each_view
def test_the_product_is_as_exact_as_pytorch(
    transposed: bool, shape: tuple[int, ...], rows: Any, dtype: torch.dtype
) -> None:
    grouped = GroupedRows(torch.tensor(rows[0]), rows[1])
    weight, own = weights(rows[1], shape, transposed, dtype)
    x = torch.randn(len(grouped), *shape[:2]).to(dtype)
    assert_at_most_twice_eager("lora_product", x, weight, own, grouped)
    assert_at_most_twice_eager("lora_product", x, None, own, grouped)


@each_dtype
@each_rows
@each_shape
@each_view
def test_the_update_is_as_exact_as_pytorch(
    transposed: bool, shape: tuple[int, ...], rows: Any, dtype: torch.dtype
) -> None:
    grouped = GroupedRows(torch.tensor(rows[0]), rows[1])
    _, own = weights(rows[1], shape, transposed, dtype)
    tokens, inputs, outputs = shape
    x = torch.randn(len(grouped), tokens, inputs).to(dtype)
    e = torch.randn(len(grouped), tokens, outputs).to(dtype)
    for before in (own, own[:1].expand(own.shape), None):
        assert_at_most_twice_eager("lora_materialise", before, e, x, grouped, -0.3)


def test_inputs_without_or_with_several_token_dimensions_and_strides() -> None:
    rows = GroupedRows(torch.tensor([1, 0]), 2)
    _, own = weights(2, (0, 6, 3), False, torch.float32)
    for tokens in ((), (2, 5)):
        x = torch.randn(6, *tokens, 2).transpose(0, -1)
        e = torch.randn(2, *tokens, 1).expand(2, *tokens, 3)
        assert_at_most_twice_eager("lora_product", x, None, own, rows)
        assert_at_most_twice_eager("lora_materialise", own, e, x, rows, 2.0)


@pytest.mark.parametrize("module", [eager, kernels], ids=["torch", "triton"])
def test_in_bf16_a_change_that_rounding_would_lose_arrives(module: Any) -> None:
    # W's columns come in equal pairs and x's in opposite ones: x Wᵀ = 0, only the change is left
    rows = GroupedRows(torch.tensor([1, 0]), 2)
    weight = torch.randn(3, 8).repeat_interleave(2, 1).bfloat16()
    own = weight.float() + 1e-5 * torch.randn(2, 3, 16)
    half = torch.randn(2, 5, 8).repeat_interleave(2, 2).bfloat16()
    x = half * torch.tensor([1, -1], dtype=torch.bfloat16).repeat(8)
    exact = x.double() @ own.double()[rows.group_B].mT
    got = module.lora_product(x, weight, own, rows)
    assert relative_error(got, exact) < 1e-2
