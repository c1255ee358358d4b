"""A step runs in the order that docs/autograd.md gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch

from gdprompt_fast import MetaBatch, fast_meta_step
from gdprompt_fast.ops.gradient import WeightGradient
from gdprompt_fast.ops.linear import InnerLinear

pytestmark = pytest.mark.quick

Build = Callable[..., Any]
Event = tuple[str, str]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """(what happens, the layer's weight) of every linear layer, in order."""
    seen: list[Event] = []
    record, add_use = InnerLinear.record, InnerLinear.add_use
    cotangents, take = InnerLinear.factor_cotangents, WeightGradient.take

    def place(tensor: torch.Tensor) -> str:
        return str(tensor.data_ptr())

    def recorded(layer: InnerLinear, x: torch.Tensor, *rest: Any) -> Any:
        factor = record(layer, x, *rest)
        assert factor.x_GSI.data_ptr() == x.data_ptr()  # X is a view of what autograd has saved
        seen.append(("record", place(layer.weight_OI)))
        return factor

    def used(
        layer: InnerLinear, u: Any, f: Any, level: int, *matches: Any, double_backward: bool = False
    ) -> None:
        what = "double backward" if double_backward else f"last backward, level {level}"
        seen.append((what, place(layer.weight_OI)))
        add_use(layer, u, f, level, *matches, double_backward=double_backward)

    def formed(layer: InnerLinear, factor: Any, *totals: Any) -> Any:
        seen.append((f"factor with {len(factor.uses)} use", place(layer.weight_OI)))
        return cotangents(layer, factor, *totals)

    def taken(gradient: WeightGradient) -> Any:
        seen.append(("take", place(gradient._parameter)))
        return take(gradient)

    monkeypatch.setattr(InnerLinear, "record", recorded)
    monkeypatch.setattr(InnerLinear, "add_use", used)
    monkeypatch.setattr(InnerLinear, "factor_cotangents", formed)
    monkeypatch.setattr(WeightGradient, "take", taken)
    return seen


def test_a_step_runs_in_the_order_of_its_page(
    events: list[Event], tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model("llama-untied"), make_batch()
    assert isinstance(batch, MetaBatch)
    weights = {
        str(module.weight.data_ptr()): name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and name != "lm_head"
    }
    fast_meta_step(model, batch, objective="gold", backend="torch", verify="never")
    of_layers = [(what, weights[place]) for what, place in events if place in weights]
    phases = [what for what, _ in groupby(of_layers, key=lambda event: event[0])]
    up = [name for what, name in of_layers if what == "double backward"]
    places = [_place(name) for name in up]
    assert phases == [
        "record",
        "last backward, level 1",
        *["double backward", "factor with 1 use"] * len(weights),
        "last backward, level 0",
        "take",
    ]
    assert set(up) == set(weights.values())
    for what in ("record", "last backward, level 1", "last backward, level 0"):
        assert [_place(name) for each, name in of_layers if each == what] == places[::-1]
    assert sorted(name for what, name in of_layers if what == "take") == sorted(up)
    assert {what for what, place in events if place not in weights} == {"take"}  # embedding, head


def _place(name: str) -> str:
    """Of a layer among the others; layers that read the same input have one."""
    return re.sub(r"(q|k|v|gate|up)_proj$", lambda m: "mlp" if len(m[1]) > 1 else "qkv", name)
