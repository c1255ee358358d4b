"""Context tokens whose NLL does not count: exact everywhere, and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdprompt_fast import (
    MetaBatch,
    check_exactness,
    fast_meta_step,
    inner_step,
    reference_meta_step,
)
from gdprompt_fast.errors import UserError
from gdprompt_fast.reference.compare import gradients_of, without_upcasts, worst_error
from helpers.truth import derivative, dot, objective, random_direction, unit

Build = Callable[..., Any]


def with_loss_mask(batch: MetaBatch, seed: int = 0) -> MetaBatch:
    """Only some tokens of each context count, the last real one among them."""
    generator = torch.Generator().manual_seed(seed)
    real = batch.context_mask
    counted = real & (torch.rand(real.shape, generator=generator) < 0.4)
    last = real & ~real.roll(-1, 1).index_fill(1, torch.tensor([real.shape[1] - 1]), False)
    return dataclasses.replace(batch, context_loss_mask=counted | last)


@pytest.mark.parametrize("options", [{}, {"inner_steps": 2}, {"micro_groups": 1}], ids=str)
@pytest.mark.parametrize("kind", ["one-each", "grouped", "uneven"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2-conv1d-positions"])
def test_the_step_is_exact(
    name: str, kind: str, options: dict[str, Any], tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(name), with_loss_mask(make_batch(kind))
    options = dict(inner_lr=0.1, objective="gold", lm_weight=0.5, **options)
    with without_upcasts(model):
        expected, reference = gradients_of(reference_meta_step, model, batch, **options)
    out, got = gradients_of(fast_meta_step, model, batch, **options)
    assert worst_error(got, reference)[0] < 1e-9
    torch.testing.assert_close(out.outer_loss, expected.outer_loss)
    _, of_all = gradients_of(fast_meta_step, model, make_batch(kind), **options)
    assert worst_error(of_all, reference)[0] > 1e-2


def test_it_is_the_derivative_of_the_true_objective(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model(), with_loss_mask(make_batch("grouped"))
    options: dict[str, Any] = dict(inner_lr=0.1, lm_weight=0.5)
    _, gradient = gradients_of(fast_meta_step, model, batch, objective="gold", **options)
    v = unit(random_direction(model, 0))
    expected = derivative(model, v, lambda: objective(model, batch, **options), 1e-4)
    assert dot(gradient, v) == pytest.approx(expected, rel=1e-7)
    assert check_exactness(model, batch, objective="gold", **options).exact


def test_an_inner_step_moves_by_the_tokens_that_count(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model(), with_loss_mask(make_batch())
    tokens = batch.context_ids, batch.context_mask
    adapted = inner_step(model, *tokens, inner_lr=0.1, context_loss_mask=batch.context_loss_mask)
    with adapted.applied_to(model, torch.arange(3)):
        got = model(batch.query_ids).logits
    for row in range(3):
        again = inner_step(
            model,
            *(each[row : row + 1] for each in tokens),
            inner_lr=0.1,
            context_loss_mask=batch.context_loss_mask[row : row + 1],
        )
        with again.applied_to(model, torch.tensor([0])):
            torch.testing.assert_close(model(batch.query_ids[row : row + 1]).logits[0], got[row])
    everything = inner_step(model, *tokens, inner_lr=0.1)
    with everything.applied_to(model, torch.arange(3)):
        assert not torch.allclose(model(batch.query_ids).logits, got, rtol=1e-2)


def test_bad_masks_are_errors(make_batch: Build) -> None:
    batch = make_batch()
    for mask, message in (
        (batch.context_mask.int(), r"context_loss_mask: expected a BoolTensor \[C, Tc\]"),
        (torch.ones_like(batch.context_mask), "expected real tokens, got padding in row 1"),
        (batch.context_mask & (torch.arange(8) == 0), "expected a token after the first in every"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(batch, context_loss_mask=mask)
