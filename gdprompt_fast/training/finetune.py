"""Preparation (arXiv 2506.20989, §4.3): brief fine-tuning in the Prompt and No Context formats.

It teaches a base model what a query and an answer look like, so that what is measured afterwards is
where the information comes from. The prepared model is what is meta-trained, and, frozen, the
teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artifacts.progress import progress_bar
from ..config.fields import Config, check_counts, check_numbers, option
from ..data import (
    Example,
    LengthSampler,
    Rows,
    Sampler,
    ShuffledSampler,
    prompt_rows,
    prompt_sizes,
    query_rows,
)
from ..distributed.sharded import is_sharded
from ..meta.lm_batch import LMBatch
from ..meta.texts import text_backward
from ..models.architecture import backbone_and_head, compute_dtype, hidden_states, predicting_states
from .late import LateNumbers, Numbers
from .optim import ClippedAdam, check_norm, warmup_then_cosine

FORMATS = prompt_rows, query_rows


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(Config):
    """What preparation does; every field is an option of the command line.

    Raises:
        UserError: naming the option, what was expected and what was given.
    """

    steps: int = option(100, "steps of Adam")
    batch_size: int = option(16, "examples in a step, each in both formats")
    lr: float = option(1e-5, "highest learning rate of Adam, reached after the warm-up")
    warmup_steps: int = option(10, "steps of linear warm-up; a cosine to zero follows")
    clip_norm: float = option(1.0, "largest norm of the gradient; a larger one is scaled")
    text_weight: float = option(0.0, "weight of the next-token loss on what is not the response")
    group_by_length: bool = option(
        True, "draw batches of about equal lengths, in which little is padding"
    )
    seed: int = option(0, "seed of the order of the examples")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "steps", "batch_size")
        check_numbers(self, "lr", "clip_norm", above_zero=True)
        check_numbers(self, "warmup_steps", "text_weight", above_zero=False)

    def learning_rate(self, step: int) -> float:
        """Adam's rate at ``step``, counted from 0: a linear warm-up, then a cosine to zero."""
        return warmup_then_cosine(step, self.steps, self.warmup_steps, self.lr)


def fine_tune(model: nn.Module, examples: Sequence[Example], options: PrepareOptions) -> None:
    """Fine-tunes ``model`` in place on the gold responses, in both formats of every example.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    model.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = ClippedAdam(trained, options.clip_norm, "gradient")
    late = LateNumbers(trained[0].device)
    sampler: Sampler = ShuffledSampler(len(examples), options.seed)
    if options.group_by_length:
        sampler = LengthSampler(prompt_sizes(examples), options.seed, options.batch_size)
    with progress_bar(options.steps, "preparing", "step") as bar:

        def check(numbers: Numbers) -> None:
            loss, step = numbers["loss"], int(numbers["step"])
            if not math.isfinite(loss):
                raise FloatingPointError(f"fine-tuning loss: it is {loss} at step {step}")
            if "norm" in numbers:
                check_norm(numbers["norm"], step, "gradient")
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

        for step in range(options.steps):
            batch = [examples[index] for index in sampler.take(options.batch_size)]
            loss = fine_tuning_backward(model, batch, options.text_weight)
            rate = options.learning_rate(step)
            norm = optimizer.update(rate, step, (~loss.isfinite()).float())
            late.add({"step": step, "loss": loss, "norm": norm}, check)
            bar.update()
        late.read_all()


def fine_tuning_backward(
    model: nn.Module,
    examples: Sequence[Example],
    text_weight: float = 0.0,
    count: int | None = None,
) -> Tensor:
    """The mean of :func:`row_loss` over the two formats, detached; adds its gradient to
    ``.grad``.
    """
    halves = [
        0.5 * row_backward(model, rows, 0.5, text_weight, count).double()
        for rows in (in_rows(examples) if examples else None for in_rows in FORMATS)
    ]
    return torch.stack(halves).sum()


def row_backward(
    model: nn.Module,
    rows: Rows | None,
    weight: float,
    text_weight: float = 0.0,
    count: int | None = None,
) -> Tensor:
    """:func:`row_loss`, detached; adds ``weight`` times its gradient to ``.grad``.

    Args:
        rows: None where a process has none, which all of a sharded model's come here with.
    """
    device: torch.device = next(model.parameters()).device
    if is_sharded(model):
        texts = LMBatch.padding() if rows is None else _texts(rows, text_weight)
        return text_backward(model, texts.to(device), count or len(texts), weight)
    if rows is None:
        return torch.zeros((), device=device)
    loss = row_loss(model, rows.to(device), text_weight, count)
    (weight * loss).backward()
    return loss.detach()


def _texts(rows: Rows, text_weight: float) -> LMBatch:
    """The rows as the engine takes them, with the weights of :func:`row_loss`."""
    return LMBatch.weighted(rows.ids, _token_weights(rows, text_weight))


def row_loss(
    model: nn.Module, rows: Rows, text_weight: float = 0.0, count: int | None = None
) -> Tensor:
    """The mean over rows of

        mean NLL of the response's tokens + text_weight · mean NLL of the tokens before it

    with logits only at the positions that count; of rows that are a part of ``count``, their share.
    """
    dtype, device = compute_dtype(model), rows.ids.device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        hidden_BTD = hidden_states(model, rows.ids)
        weight_BT = _token_weights(rows, text_weight)
        counts = weight_BT > 0
        logits_NV = backbone_and_head(model)[1](predicting_states(hidden_BTD, counts))
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    nll_N = F.cross_entropy(logits_NV.to(wide), rows.ids[counts], reduction="none")
    return (nll_N * weight_BT[counts]).sum() / (count or len(rows.ids))


def _token_weights(rows: Rows, text_weight: float) -> Tensor:
    """The weight of every token's NLL in its row, [B, T]; a row's first token is predicted by
    nothing.
    """
    text = rows.mask & ~rows.response_mask
    text[:, 0] = False
    response, text = rows.response_mask.float(), text.float()
    per_text = text_weight / text.sum(1, keepdim=True).clamp(min=1)
    return response / response.sum(1, keepdim=True) + per_text * text
