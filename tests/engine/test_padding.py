"""Rows, groups and response slots of weight zero are without effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gdprompt_fast import BatchShape, MetaBatch, TeacherTargets, fast_meta_step, reference_meta_step
from gdprompt_fast.errors import UserError
from gdprompt_fast.reference.compare import without_upcasts

Build = Callable[..., Any]
LARGER = {
    "longer rows": dict(context_tokens=11, query_tokens=9),
    "more response slots": dict(group_responses=9),
    "more contexts and queries": dict(contexts=9, queries=8, group_contexts=9, group_queries=8),
    "more groups": dict(groups=5, contexts=12, queries=12, group_contexts=4, group_queries=4),
    "all of it": dict(
        groups=5,
        contexts=15,
        context_tokens=10,
        queries=15,
        query_tokens=8,
        group_contexts=7,
        group_queries=7,
        group_responses=10,
    ),
}


def larger(batch: MetaBatch, sizes: dict[str, int]) -> BatchShape:
    own = batch.layout.shape._asdict()
    return BatchShape(**{name: max(own[name], sizes.get(name, 0)) for name in own})


def gradient(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["one-each", "grouped", "uneven"])
@pytest.mark.parametrize("sizes", LARGER.values(), ids=LARGER)
@pytest.mark.parametrize("teacher", [False, True], ids=["gold", "kl"])
def test_padding_is_without_effect(
    tiny_model: Build, make_batch: Build, kind: str, sizes: dict[str, int], teacher: bool
) -> None:
    model, batch = tiny_model("llama-tied"), make_batch(kind)
    options: dict[str, Any] = dict(inner_lr=0.1, lm_weight=0.3, outer_reduction="mean")
    options |= dict(objective="kl" if teacher else "gold")
    if teacher:
        logits = torch.randn(batch.layout.tokens, model.config.vocab_size, dtype=torch.float64)
        options["teacher"] = TeacherTargets.from_logits(logits)
    with without_upcasts(model):
        expected = reference_meta_step(model, batch, **options)
    exact = gradient(model)
    padded = batch.padded(larger(batch, sizes))
    assert padded.layout.shape != batch.layout.shape
    out = fast_meta_step(model, padded, **options)
    for name in ("outer_loss", "query_loss", "lm_loss", "inner_loss"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-10, atol=0)
    for mine, theirs in zip(gradient(model), exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_nothing_but_padding_adds_nothing(tiny_model: Build) -> None:
    model = tiny_model("llama-tied")
    out = fast_meta_step(model, MetaBatch.padding(), objective="gold", lm_weight=0.3)
    assert out.outer_loss == out.inner_loss == out.lm_loss == 0
    assert all(not grad.any() for grad in gradient(model))
    none = TeacherTargets.from_logits(torch.zeros(0, model.config.vocab_size).double())
    assert fast_meta_step(model, MetaBatch.padding(), teacher=none).outer_loss == 0


def test_a_share_of_nothing_completes_the_others(tiny_model: Build, make_batch: Build) -> None:
    """As of processes of which one has no part of the batch."""
    model, batch = tiny_model("llama-tied"), make_batch("grouped")
    options: dict[str, Any] = dict(objective="gold", inner_lr=0.1, lm_weight=0.3)
    fast_meta_step(model, batch, **options)
    exact = gradient(model)
    counts = dict(query_count=len(batch.query_ids), lm_count=len(batch.context_ids))
    shares = [batch.select([0])[0], batch.select([1, 2])[0], MetaBatch.padding()]
    for share in shares:
        fast_meta_step(model, share, **options, **counts)
    for mine, theirs in zip(gradient(model), exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_a_batch_that_does_not_fit_is_an_error(make_batch: Build) -> None:
    batch = make_batch()
    with pytest.raises(UserError, match="shape: expected at least"):
        batch.padded(batch.layout.shape._replace(context_tokens=4))
    with pytest.raises(UserError, match="a context for each of the 2 groups of padding"):
        batch.padded(batch.layout.shape._replace(groups=5))


def test_a_batch_that_is_written_to_is_laid_out_again(make_batch: Build) -> None:
    batch = make_batch()
    before = batch.layout
    assert batch.layout is before
    batch.response_mask[0, 2] = True
    assert batch.layout.tokens == before.tokens + 1
    batch.context_group[0] = 7
    with pytest.raises(UserError, match="context_group: group"):
        _ = batch.layout


def test_groups_of_a_batch_that_was_written_to_are_those_of_now(make_batch: Build) -> None:
    batch = make_batch().map(torch.clone)  # as on another device: the host has its own
    batch.response_mask[0, 2] = True
    some, tokens = batch.select([0])
    assert some.layout.tokens == len(tokens) == int(batch.response_mask[0].sum())


def test_moved_batches_are_not_looked_at_again(
    make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch("grouped")
    monkeypatch.setattr("gdprompt_fast.batch.lay_out", None)
    monkeypatch.setattr("gdprompt_fast.batch.check_contexts", None)
    moved = batch.to("cpu")
    assert moved.layout.shape == batch.layout.shape


@pytest.mark.parametrize("size", [1, 7, 16, 17, 33, 250, 1000, 4097])
def test_the_ladder_has_rungs_no_further_apart_than_an_eighth(size: int) -> None:
    shape = BatchShape(1, 1, size, 1, size, 1, 1, size).rung()
    assert size <= shape.context_tokens <= max(size * 1.13, size)
    assert shape.rung() == shape
