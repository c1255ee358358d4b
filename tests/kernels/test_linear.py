"""The fused inner update in Triton, under its interpreter, against fp64."""

from __future__ import annotations

import pytest
import torch

from gdprompt_fast.testing.gates import FLOOR, relative_error

pytest.importorskip("triton", reason="Triton is not installed")

from gdprompt_fast.kernels import linear as kernels
from gdprompt_fast.ops.eager import linear as eager


@pytest.mark.parametrize("transposed", [False, True], ids=["weight-OI", "weight-IO"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 16, 16, 1),
        (3, 1, 41, 17, 5),
        (2, 37, 32, 48, 13),
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
) -> None:
    groups, rows, inputs, outputs, context = shape
    weight = torch.randn(inputs, outputs).T if transposed else torch.randn(outputs, inputs)
    x, match = torch.randn(groups, rows, inputs), torch.randn(groups, rows, context)
    factor, b = torch.randn(groups, context, outputs), torch.randn(outputs) if bias else None
    tensors = [None if t is None else t.to(dtype) for t in (x, weight, b, match, factor)]
    exact = eager.updated_product(*(None if t is None else t.double() for t in tensors), -0.3)
    plain = eager.updated_product(*tensors, -0.3)
    got = kernels.updated_product(*tensors, -0.3)
    assert got.dtype == dtype
    error, allowed = relative_error(got, exact), 2 * relative_error(plain, exact) + FLOOR[dtype]
    assert error <= allowed, f"error {error:.1e}, allowed {allowed:.1e}"
