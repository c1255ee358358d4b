"""What a double backward leaves for the last backward is added there, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gdprompt_fast.ops.backend import implementation
from gdprompt_fast.testing.gates import copied
from gdprompt_fast.testing.op_inputs import PASSES, drawer

SIZES = dict(examples=2, tokens=5, hidden=24, batch=2, heads=4, kv_heads=2, dim=8)
OPS = {"swiglu": 3, "norm": 2, "attention": 1}  # the place of ``into`` in the backward


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("op", OPS)
def test_a_backward_adds_to_what_was_left(op: str) -> None:
    draw = drawer(torch.device("cpu"), torch.float32)
    inputs = PASSES[op](draw, {**SIZES, "add": 1})[f"{op}_backward"]
    place, passes = OPS[op], implementation(op, inputs[0])
    backward: Callable[..., Any] = getattr(passes, f"{op}_backward")
    alone = backward(*inputs[:place], None, *inputs[place + 1 :])
    given, taken = inputs[place], copied(inputs)
    added = backward(*taken)
    given, taken = ((t,) if isinstance(t, Tensor) else t for t in (given, taken[place]))
    for own, before, total, buffer in zip(alone, given, added, taken, strict=False):
        assert total.data_ptr() == buffer.data_ptr()
        torch.testing.assert_close(total, own + before)
