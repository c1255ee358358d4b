"""The three settings: No Context, Prompt and Fine-Tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..data import Example, batched, meta_batch, prompt_rows, query_rows
from ..meta.inner import inner_step
from ..progress import progress_bar
from ..teacher import greedy_answers
from .scores import Scores, Summary, score_rows

SETTINGS = {"no_context": "No Context", "prompt": "Prompt", "fine_tuning": "Fine-Tuning"}

BatchScorer = Callable[[list[Example]], Scores]


@dataclass(frozen=True)
class InnerStep:
    """How the context goes into the weights: the options of :func:`gdprompt_fast.inner_step`."""

    lr: float
    steps: int = 1
    params: str = "full"


def evaluate(
    model: nn.Module, examples: Sequence[Example], inner: InnerStep, batch_size: int
) -> dict[str, Scores]:
    """The scores of the gold responses in each of the three settings, by the keys of ``SETTINGS``.

    - No Context: the query alone, at θ;
    - Prompt: context ⊕ query, at θ;
    - Fine-Tuning: the query alone, at the example's own θ', one inner step on its context away.
    """
    return {
        "no_context": no_context_scores(model, examples, batch_size),
        "prompt": prompt_scores(model, examples, batch_size),
        "fine_tuning": fine_tuning_scores(model, examples, inner, batch_size),
    }


def no_context_scores(model: nn.Module, examples: Sequence[Example], batch_size: int) -> Scores:
    """The responses scored after the query alone."""
    device = _device(model)

    def score(batch: list[Example]) -> Scores:
        return score_rows(model, query_rows(batch).to(device))

    return _in_batches(score, examples, batch_size, SETTINGS["no_context"])


def prompt_scores(model: nn.Module, examples: Sequence[Example], batch_size: int) -> Scores:
    """The responses scored after context ⊕ query."""
    device = _device(model)

    def score(batch: list[Example]) -> Scores:
        return score_rows(model, prompt_rows(batch).to(device))

    return _in_batches(score, examples, batch_size, SETTINGS["prompt"])


def fine_tuning_scores(
    model: nn.Module, examples: Sequence[Example], inner: InnerStep, batch_size: int
) -> Scores:
    """The responses scored after the query alone, each at its own θ', a whole batch at once."""
    device = _device(model)

    def score(batch: list[Example]) -> Scores:
        with adapted_to_contexts(model, batch, inner):
            return score_rows(model, query_rows(batch).to(device))

    return _in_batches(score, examples, batch_size, f"{SETTINGS['fine_tuning']}, η = {inner.lr:g}")


def fine_tuned_answers(
    model: nn.Module, examples: Sequence[Example], inner: InnerStep, eos: int, max_tokens: int
) -> list[list[int]]:
    """The greedy answers to the queries alone, each at its own θ', all at once."""
    with adapted_to_contexts(model, examples, inner):
        return greedy_answers(model, [example.query for example in examples], eos, max_tokens)


@contextmanager
def adapted_to_contexts(
    model: nn.Module, examples: Sequence[Example], inner: InnerStep
) -> Iterator[None]:
    """Inside, row b of the model's input runs at the θ' of example b, adapted to its context."""
    batch = meta_batch(examples).to(_device(model))
    update = inner_step(
        model,
        batch.context_ids,
        batch.context_mask,
        inner_lr=inner.lr,
        inner_steps=inner.steps,
        inner_params=inner.params,
    )
    with update.applied_to(model, groups=batch.query_group):
        yield


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
) -> TunedInnerStep:
    """Chooses the rate with the highest Fine-Tuning accuracy, then the lowest NLL.

    Choosing on the very examples that are then reported favours the model, so do it for the
    baseline only: what is claimed over it is then claimed over the best that it can do.
    """
    tried = {}
    for lr in grid:
        # With several inner steps a large rate can make the inner loss infinite on the way.
        with suppress(FloatingPointError):
            scores = fine_tuning_scores(model, examples, replace(inner, lr=lr), batch_size)
            tried[lr] = scores.summary()
    if not tried:
        raise FloatingPointError("inner loss: expected a finite one at some inner rate, got none")
    return TunedInnerStep(replace(inner, lr=max(tried, key=lambda lr: _merit(tried[lr]))), tried)


def _merit(summary: Summary) -> tuple[float, float]:
    """Larger is better; a rate so large that the NLL is not a number is the worst."""
    nll = summary.nll_per_token
    return (summary.accuracy, -nll) if math.isfinite(nll) else (-1.0, 0.0)


def _in_batches(
    score: BatchScorer, examples: Sequence[Example], batch_size: int, what: str
) -> Scores:
    parts = []
    with progress_bar(len(examples), f"evaluating {what}", "ex", leave=False) as bar:
        for batch in batched(examples, batch_size):
            parts.append(score(batch))
            bar.update(len(batch))
    return Scores.concatenate(parts)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
