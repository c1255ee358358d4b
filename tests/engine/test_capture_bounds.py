"""When a step is not captured, and how much is kept of those that are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdprompt_fast.meta import capture, compute
from gdprompt_fast.models.memory import PeakMemory
from helpers.captured import gold_step, gradients, recorded, same
from helpers.tape import Tape

pytestmark = pytest.mark.usefixtures("tapes")
Build = Callable[..., Any]


def test_a_capture_that_fails_is_an_eager_step_with_a_reason(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(Tape):
        def record(self, work: Callable[[], None]) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(capture.Graphs, "new_graph", lambda _: Refusing())
    model, batch = tiny_model("llama-tied"), make_batch()
    for _ in range(3):
        out = gold_step(model, batch)
        ours = gradients(model)
    assert not out.captured and "not permitted" in out.eager
    gold_step(model, batch, capture="never")
    for mine, plain in zip(ours, gradients(model), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-13)


def test_without_memory_for_a_graph_the_step_is_eager(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Tape):
        def record(self, work: Callable[[], None]) -> None:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(capture.Graphs, "new_graph", lambda _: Full())
    model, batch = tiny_model("llama-tied"), make_batch()
    for _ in range(3):
        out = gold_step(model, batch)
    assert "no memory" in out.eager


def test_without_memory_beside_the_graphs_the_step_is_taken_without_them(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, other = tiny_model("llama-tied"), make_batch(), make_batch("grouped")
    for _ in range(2):
        assert gold_step(model, batch) is not None
    graphs, own = capture._graphs[model], compute.MetaStep.backward
    assert graphs._recorded

    def in_little_memory(self: Any, inputs: Any) -> Any:
        done = own(self, inputs)
        if graphs._recorded:
            raise torch.OutOfMemoryError("out of memory")
        return done

    model.zero_grad()
    monkeypatch.setattr(compute.MetaStep, "backward", in_little_memory)
    gold_step(model, other)
    ours = gradients(model)
    monkeypatch.setattr(compute.MetaStep, "backward", own)
    gold_step(model, other, capture="never")
    assert not graphs._recorded and same(ours, gradients(model))


def test_a_larger_shape_is_recorded_before_smaller_ones(
    tiny_model: Build, make_batch: Build
) -> None:
    """In whose memory they live: they are recorded again after it."""
    model, small, large = tiny_model("llama-tied"), make_batch(), make_batch("grouped")
    order = (small, small, large, large, small, small, large)
    captured = [gold_step(model, batch).captured for batch in order]
    assert captured == [False, True, False, True, True, True, True]
    shapes = [len(each.inputs[0]) for each in capture._graphs[model]._recorded.values()]
    assert sorted(shapes, reverse=True) == sorted(set(shapes), reverse=True) and len(shapes) == 2


def test_under_a_dispatch_mode_the_step_is_eager(tiny_model: Build, make_batch: Build) -> None:
    """It would count, or record, nothing of a replay."""
    model, batch = tiny_model("llama-tied"), make_batch()
    recorded(model, batch)
    with PeakMemory() as memory:
        out = gold_step(model, batch)
    assert "a dispatch mode" in out.eager and memory.peak_bytes > 0


def test_graphs_are_bounded_and_the_oldest_goes(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "MOST_GRAPHS", 2)
    model, kinds = tiny_model("llama-tied"), ("one-each", "grouped", "uneven")
    for _ in range(2):
        for kind in kinds:
            gold_step(model, make_batch(kind))
    (graphs,) = [capture._graphs[model]]
    assert len(graphs._recorded) == 2
    assert gold_step(model, make_batch("uneven")).captured
