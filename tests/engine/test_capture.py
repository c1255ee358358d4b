"""Steps replayed as graphs, on tapes that stand in for CUDA's: the bits of an eager step, on other
batches, weights and numbers than were recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdprompt_fast import LMBatch, MetaBatch, TeacherTargets, fast_meta_step
from gdprompt_fast.meta import capture
from gdprompt_fast.meta.failures import found_on_the_device
from helpers.tape import on_tapes

Build = Callable[..., Any]


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    on_tapes(monkeypatch.setattr)
    with found_on_the_device():
        yield


def gradients(model: nn.Module) -> list[Tensor | None]:
    """The gradients, which are None afterwards."""
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    """To the bit."""
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def teacher_of(batch: MetaBatch, head: Tensor, seed: int) -> TeacherTargets:
    """Random final states of a teacher with a head of its own."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch.layout.tokens, head.shape[1], generator=generator, dtype=head.dtype)
    return TeacherTargets(hidden=hidden, head=head)


OPTIONS: dict[str, dict[str, Any]] = {
    "gold": dict(objective="gold"),
    "kl": {},
    "kl, the mean over tokens": dict(outer_reduction="mean"),
    "with L_LM on the contexts": dict(lm_weight=0.3),
    "with L_LM on other texts": dict(lm_weight=0.3, lm_batch=True),
    "two inner steps": dict(inner_steps=2),
    "three inner steps": dict(inner_steps=3, objective="gold"),
    "first order": dict(first_order=True),
    "micro-groups": dict(micro_groups=2, lm_weight=0.2),
    "a rate for every group": dict(inner_lr="groups"),
    "a count of a larger batch": dict(query_count=7, lm_count=9, lm_weight=0.1),
    "plain ops": dict(backend="torch"),
}


def arguments(options: dict[str, Any], batch: MetaBatch, head: Tensor, step: int) -> dict[str, Any]:
    """Of a step: every number is another than at the step before."""
    given = {"inner_lr": 0.1, **options}
    if given["inner_lr"] == "groups":
        given["inner_lr"] = torch.linspace(0.05, 0.1 + 0.01 * step, batch.groups).double()
    else:
        given["inner_lr"] *= 1 + 0.5 * step
    if given.get("lm_weight"):
        given["lm_weight"] *= 1 + step
    if given.get("query_count"):
        given["query_count"] += step
    if given.get("lm_batch"):
        ids, mask = batch.query_ids.flip(0), batch.query_mask.flip(0)
        given["lm_batch"] = LMBatch(ids, mask)
    if given.get("objective") != "gold":
        given["teacher"] = teacher_of(batch, head, step)
    return given


def not_recorded(_: Any, key: Any, unit: Any, inputs: Any, trained: Any) -> tuple[Any, str]:
    """In the place of ``Graphs.run``: the same work on the same shapes, by Python."""
    return unit(inputs), "not recorded"


@pytest.mark.parametrize("kind", ["one-each", "grouped", "uneven"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_replay_has_the_bits_of_an_eager_step(
    tiny_model: Build,
    make_batch: Build,
    kind: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama-tied")
    head = torch.randn_like(model.get_output_embeddings().weight)
    captured = []
    for step in range(3):
        batch = make_batch(kind, seed=step)
        given = arguments(options, batch, head, step)
        out = fast_meta_step(model, batch, **given)
        ours = gradients(model)
        plain = fast_meta_step(model, batch, **given, capture="never")
        theirs = gradients(model)
        assert not plain.captured
        captured.append(out.captured)
        with monkeypatch.context() as eagerly:
            eagerly.setattr(capture.Graphs, "run", not_recorded)
            same_work = fast_meta_step(model, batch, **given)
        assert torch.equal(out.outer_loss, same_work.outer_loss)
        assert same(ours, gradients(model))
        for mine, yours in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, yours, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(out.outer_loss, plain.outer_loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(out.inner_loss, plain.inner_loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(out.lm_loss, plain.lm_loss, rtol=1e-12, atol=0)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), ours, strict=True):
                parameter -= 0.1 * gradient
    assert captured[2], out.eager
