"""A model on the evaluation set: its answers, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .metrics import Observed
from .prompts import Prompts
from .recording import Recorded, after_prefix, record

POINTS = ("candidate token", "last query token")
Recorder = Callable[[Tensor, Tensor], Recorded]  # of ids [B, T] and positions [B, P]


@dataclass(frozen=True)
class Batch:
    """Some queries of the evaluation set.

    Attributes:
        indices: which.
        prefix: how many tokens of a row stand before the query's text.
        lengths: of the queries.
        recorded: at ``POINTS``.
    """

    indices: list[int]
    prefix: int
    lengths: list[int]
    recorded: Recorded


def observe(batches: Iterator[Batch], prompts: Prompts, count: int) -> Observed:
    """What the batches, which together are of the first ``count`` queries, show."""
    width = max(len(query) for query in prompts.queries[:count]) + 1
    parts: dict[int, tuple[Tensor, Tensor, int]] = {}
    for batch in batches:
        scores = scores_on_query(batch, width)
        logits = check_finite(batch.recorded).logits[:, 1, prompts.options]
        for row, index in enumerate(batch.indices):
            answer = int(logits[row].argmax())
            parts[index] = batch.recorded.attention[row].cpu(), scores[row].cpu(), answer
    attention, score, predicted = zip(*(parts[index] for index in range(count)), strict=True)
    return Observed(torch.stack(attention), torch.stack(score), torch.tensor(predicted))


def check_finite(recorded: Recorded) -> Recorded:
    """What is recorded, if it can be compared.

    Raises:
        FloatingPointError: if some of it is not finite.
    """
    for name in ("logits", "attention", "scores"):
        if not getattr(recorded, name).isfinite().all():
            raise FloatingPointError(f"icl: expected finite {name}, got others; a rate too large?")
    return recorded


def scores_on_query(batch: Batch, width: int) -> Tensor:
    """The columns of the query's text, and at the candidate's token of the candidate, padded to
    ``width`` with zeros, [B, P, L, H, width].
    """
    scores = batch.recorded.scores[..., batch.prefix :]
    scores = F.pad(scores, (0, max(0, width - scores.shape[-1])))[..., :width].clone()
    for row, length in enumerate(batch.lengths):
        scores[row, 0, ..., length + 1 :] = 0
        scores[row, 1, ..., length:] = 0
    return scores


def zero_shot(model: nn.Module, prompts: Prompts, count: int, batch_size: int) -> Iterator[Batch]:
    """BOS, query and candidate, of the first ``count`` queries."""
    return recorded_rows(
        lambda ids, positions: record(model, ids, positions),
        [prompts.bos],
        prompts,
        count,
        batch_size,
        _device(model),
    )


def in_context(model: nn.Module, prompts: Prompts, count: int, batch_size: int) -> Iterator[Batch]:
    """The same after the demonstrations, which are run once where the model's cache serves."""
    device, length = _device(model), len(prompts.context)
    prefix = after_prefix(model, torch.tensor([prompts.context], device=device))
    if prefix is None:

        def whole(ids: Tensor, positions: Tensor) -> Recorded:
            return record(model, ids, positions)

        yield from recorded_rows(whole, prompts.context, prompts, count, batch_size, device)
        return

    def after(ids: Tensor, positions: Tensor) -> Recorded:
        return record(model, ids, positions, prefix(len(ids)))

    for batch in recorded_rows(after, [], prompts, count, batch_size, device):
        yield Batch(batch.indices, length, batch.lengths, batch.recorded)


def recorded_rows(
    recorder: Recorder,
    before: Sequence[int],
    prompts: Prompts,
    count: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Rows of ``before``, query and the first option, those of like lengths together."""
    queries = prompts.queries[:count]
    order = sorted(range(count), key=lambda index: len(queries[index]), reverse=True)
    for start in range(0, count, batch_size):
        indices = order[start : start + batch_size]
        lengths = [len(queries[index]) for index in indices]
        rows = [torch.tensor([*before, *queries[i], prompts.options[0]]) for i in indices]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        last = torch.tensor([len(before) + length for length in lengths], device=device)
        recorded = recorder(ids, torch.stack([last, last - 1], 1))
        yield Batch(indices, len(before), lengths, recorded)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
