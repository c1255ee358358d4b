"""The fused inner update in Triton, under its interpreter, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from gdprompt_fast.kernels import linear as kernels
from gdprompt_fast.kernels import linear_tiles
from gdprompt_fast.kernels.linear_tiles import POINTERS, POINTERS_FP32, Tiles
from gdprompt_fast.ops.eager import linear as eager

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3}


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


TILES = [
    POINTERS,
    POINTERS_FP32,
    Tiles(32, 32, 16, 32, warps=4, stages=2, split=3, tma=True, halved=True),
    Tiles(64, 32, 16, 16, warps=4, stages=2, tma=True),
]


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize(
    ("bias", "transposed"),
    [(False, False), (True, True)],
    ids=["weight-OI", "bias-weight-IO"],
)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 16, 16, 1),
        (3, 1, 41, 17, 5),
        (2, 37, 32, 48, 13),
        (3, 24, 72, 40, 40),
        (5, 16, 20, 70, 64),
        (2, 130, 8, 8, 3),
    ],
    ids=lambda s: "G{}-M{}-I{}-O{}-S{}".format(*s),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_updated_product_is_as_exact_as_pytorch(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    bias: bool,
    transposed: bool,
    tiles: Tiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups, rows, inputs, outputs, context = shape
    torch.manual_seed(0)
    weight = torch.randn(inputs, outputs).T if transposed else torch.randn(outputs, inputs)
    x, match = torch.randn(groups, rows, inputs), torch.randn(groups, rows, context)
    factor, b = torch.randn(groups, context, outputs), torch.randn(outputs) if bias else None
    tensors = [None if t is None else t.to(dtype) for t in (x, weight, b, match, factor)]
    exact = eager.updated_product(*(None if t is None else t.double() for t in tensors))
    plain = eager.updated_product(*tensors)
    empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *size: int, **options: Any) -> Tensor:
        tensor = empty(self, *size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    got = kernels.fused_product(*tensors, tiles)
    assert got.dtype == dtype
    error, allowed = relative_error(got, exact), 2 * relative_error(plain, exact) + FLOOR[dtype]
    assert error <= allowed, f"error {error:.1e}, allowed {allowed:.1e}"


def test_where_the_table_has_no_tiles_cublas_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(*size) for size in ((3, 4, 8), (16, 8), (16,), (3, 4, 5), (3, 5, 16))]
    fused = kernels.updated_product(*tensors)
    monkeypatch.setattr(kernels, "choose_tiles", lambda *_: None)
    torch.testing.assert_close(kernels.updated_product(*tensors), fused)


def test_tiles_on_hopper_are_those_of_the_class_unless_rows_or_groups_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiles = Tiles(128, 128, 64, 64, warps=4, stages=3, tma=True)
    monkeypatch.setattr(linear_tiles, "is_hopper", lambda _: True)
    monkeypatch.setattr(linear_tiles, "HOPPER", {("few", "middle", "wide"): tiles})

    def chosen(rows: int, context: int, inputs: int, outputs: int) -> Tiles | None:
        x = torch.empty(16, rows, inputs, dtype=torch.bfloat16, device="meta")
        return linear_tiles.choose_tiles(x, x.new_empty(16, context, outputs))

    assert chosen(32, 256, 2048, 8192) == tiles
    assert chosen(32, 17, 2048, 8192) == tiles._replace(context=32)
    assert chosen(32, 256, 2048, 2048) is None, "a class that is not in the table"
    assert chosen(32, 256, 2044, 8192) is None, "rows of W that are no multiple of 16 bytes"
    assert chosen(10, 256, 2048, 8192) is None, "a block that meets 14 groups"
