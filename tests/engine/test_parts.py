"""A batch in parts: micro-groups and denominators of a larger batch, exact to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdprompt_fast import MetaBatch, TeacherTargets, fast_meta_step, reference_meta_step
from gdprompt_fast.errors import UserError
from gdprompt_fast.meta.parts import parts_of
from gdprompt_fast.models.memory import peak_bytes_over_model
from gdprompt_fast.reference.compare import gradients_of, without_upcasts, worst_error
from helpers.models import random_batch, wide_llama

Build = Callable[..., Any]


def teacher_of(batch: MetaBatch) -> TeacherTargets:
    generator = torch.Generator().manual_seed(7)
    tokens = int(batch.response_mask.sum())
    hidden = torch.randn(tokens, 5, generator=generator, dtype=torch.float64)
    return TeacherTargets(
        hidden=hidden, head=torch.randn(67, 5, generator=generator, dtype=torch.float64)
    )


@pytest.mark.parametrize(("reduction", "recompute"), [("sum", "none"), ("mean", "block")])
@pytest.mark.parametrize("lm", ["no-lm", "lm-on-contexts", "lm-batch"])
@pytest.mark.parametrize("kind", ["one-each", "grouped", "uneven"])
@pytest.mark.parametrize("objective", ["kl", "gold"])
def test_micro_groups_add_up_to_the_whole_batch(
    objective: str,
    kind: str,
    lm: str,
    reduction: str,
    recompute: str,
    tiny_model: Build,
    make_batch: Build,
) -> None:
    model, batch = tiny_model(), make_batch(kind)
    other = make_batch("one-each", seed=5)
    options: dict[str, Any] = dict(
        inner_lr=0.1,
        objective=objective,
        teacher=teacher_of(batch) if objective == "kl" else None,
        outer_reduction=reduction,
        lm_weight=0.0 if lm == "no-lm" else 0.5,
        lm_batch=(other.context_ids, other.context_mask) if lm == "lm-batch" else None,
        recompute=recompute,
    )
    whole, expected = gradients_of(fast_meta_step, model, batch, **options)
    for size in (1, 2):
        out, got = gradients_of(fast_meta_step, model, batch, micro_groups=size, **options)
        assert worst_error(got, expected)[0] < 1e-9
        for name in ("outer_loss", "query_loss", "lm_loss", "inner_loss"):
            torch.testing.assert_close(getattr(out, name), getattr(whole, name))


@pytest.mark.quick
@pytest.mark.parametrize("step", [fast_meta_step, reference_meta_step], ids=["fast", "reference"])
def test_ragged_parts_with_the_denominators_of_the_whole_add_up(
    step: Callable[..., Any], tiny_model: Build, make_batch: Build
) -> None:
    """As gradient accumulation or several processes take them."""
    model, batch = tiny_model(), make_batch("grouped")
    options: dict[str, Any] = dict(inner_lr=0.1, objective="gold", lm_weight=0.5)
    with without_upcasts(model):
        whole, expected = gradients_of(step, model, batch, **options)
        counts = dict(query_count=len(batch.query_ids), lm_count=len(batch.context_ids))
        parts = [part.batch for part in parts_of(batch, None, 2)]
        assert len({len(part.query_ids) for part in parts}) == 2  # ragged
        model.zero_grad()
        losses = [step(model, part, **options, **counts).outer_loss for part in parts]
        got = {name: p.grad for name, p in model.named_parameters()}
        assert worst_error(got, expected)[0] < 1e-9
        torch.testing.assert_close(torch.stack(losses).sum(), whole.outer_loss)
        model.zero_grad()
        for part in parts:
            step(model, part, **options)
    wrong = {name: p.grad / len(parts) for name, p in model.named_parameters()}
    assert worst_error(wrong, expected)[0] > 1e-2


def test_micro_groups_need_the_memory_of_so_many(tiny_model: Build) -> None:
    model, batch = wide_llama(64), random_batch(12, 24, 8, 2, 1024)
    options: dict[str, Any] = dict(objective="gold", verify="never")
    few = random_batch(3, 24, 8, 2, 1024)

    def peak(batch: MetaBatch, **more: Any) -> int:
        return peak_bytes_over_model(model, lambda: fast_meta_step(model, batch, **options, **more))

    assert peak(batch, micro_groups=3) < 1.1 * peak(few)
    assert peak(batch, micro_groups=3) < 0.6 * peak(batch)


@pytest.mark.parametrize("name", ["micro_groups", "query_count", "lm_count"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_bad_counts_are_errors(name: str, value: Any, tiny_model: Build, make_batch: Build) -> None:
    with pytest.raises(UserError, match=f"{name}: expected an integer >= 1 or None, got {value!r}"):
        fast_meta_step(tiny_model(), make_batch(), objective="gold", **{name: value})
