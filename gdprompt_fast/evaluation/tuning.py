"""The inner rate at which a model that was not meta-trained does best: the baseline's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import nn

from ..data import Example
from .adapted import InnerStep, check_inner_step
from .scores import Summary
from .settings import fine_tuning_scores, whole_groups


@dataclass(frozen=True)
class TunedInnerStep:
    """The inner step with the best of several rates, and the summaries of those that worked."""

    inner: InnerStep
    tried: dict[float, Summary]


def tune_inner_lr(
    model: nn.Module,
    examples: Sequence[Example],
    inner: InnerStep,
    grid: Iterable[float],
    batch_size: int,
    *,
    contexts_per_group: int = 1,
    one_after_another: bool = False,
    group_by_length: bool = False,
) -> TunedInnerStep:
    """Chooses the rate with the highest Fine-Tuning accuracy, then the lowest NLL.

    Choosing on the very examples that are then reported favours the model, so do it for the
    baseline only: what is claimed over it is then claimed over the best that it can do.

    Args:
        contexts_per_group, one_after_another, group_by_length: as in
            :func:`gdprompt_fast.evaluation.evaluate`.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
        FloatingPointError: if the inner loss is finite at no rate.
    """
    check_inner_step(model, inner, one_after_another)
    examples = whole_groups(examples, contexts_per_group)
    tried = {}
    for lr in grid:
        # With several inner steps a large rate can make the inner loss infinite on the way.
        with suppress(FloatingPointError):
            at_lr = replace(inner, lr=lr)
            grouping = contexts_per_group, one_after_another, group_by_length
            scores = fine_tuning_scores(model, examples, at_lr, batch_size, *grouping)
            tried[lr] = scores.summary()
    if not tried:
        raise FloatingPointError("inner loss: expected a finite one at some inner rate, got none")
    return TunedInnerStep(replace(inner, lr=max(tried, key=lambda lr: _merit(tried[lr]))), tried)


def _merit(summary: Summary) -> tuple[float, float]:
    """Larger is better; a rate so large that the NLL is not a number is the worst."""
    nll = summary.nll_per_token
    return (-1.0, 0.0) if nll is None else (summary.accuracy, -nll)
