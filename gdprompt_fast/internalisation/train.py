"""Ordinary training on texts, one a row: transformers' Adafactor, as the paper's code has it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.optimization import Adafactor

from ..artifacts.files import write_whole
from ..config.fields import Config, check_counts, check_numbers
from ..errors import UserError

CHECKPOINT_FILE = "checkpoint.pt"
Watch = Callable[[int], None]


@dataclass(frozen=True)
class TrainOptions(Config):
    """A stage of training.

    Attributes:
        epochs: passes over the texts.
        batch_size: texts an optimizer step.
        micro_batch: texts at a time; 0: all of a batch.
        lr: at the first step; it falls to 0 in a line.
        block: every text is padded to as many tokens; a longer one is refused.
        padding_in_loss: every token of the block is predicted, padding included, as the paper's
            code does, which is what teaches a model to end its answer; False: the text alone, and
            the one padding token that ends it.
        clip_norm: the longest gradient.
        bf16: activations and matrix products in bf16, weights in fp32.
        checkpoint_epochs: epochs between checkpoints that an interrupted stage goes on from; 0:
            it begins anew.
    """

    epochs: int
    batch_size: int
    micro_batch: int = 0
    lr: float = 5e-5
    block: int = 48
    padding_in_loss: bool = True
    clip_norm: float = 1.0
    bf16: bool = False
    checkpoint_epochs: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "epochs", "batch_size")
        check_counts(self, "block", least=2)
        check_counts(self, "micro_batch", "checkpoint_epochs", least=0)
        check_numbers(self, "lr", "clip_norm", above_zero=True)


@dataclass(frozen=True)
class Block:
    """Texts as rows of the same length.

    Attributes:
        ids: [N, T], padded on the right.
        real: [N, T], True on tokens of the text.
        counted: [N, T], True on tokens that are predicted.
    """

    ids: Tensor
    real: Tensor
    counted: Tensor

    def rows(self, index: Tensor, device: torch.device) -> Block:
        """Some of the rows, on a device."""
        return Block(*(each[index].to(device) for each in (self.ids, self.real, self.counted)))


def to_block(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, padding_in_loss: bool
) -> Block:
    """The texts as rows, each alone in its row: two in one would be learning in context.

    Raises:
        UserError: if a text is longer than the block.
    """
    rows: list[list[int]] = [list(tokenizer(text)["input_ids"]) for text in texts]
    longest = max(range(len(rows)), key=lambda row: len(rows[row]))
    if len(rows[longest]) > length:
        raise UserError(
            f"block: expected at least the {len(rows[longest])} tokens of {texts[longest]!r}, "
            f"got {length}"
        )
    ids = torch.full((len(rows), length), padding_of(tokenizer))
    sizes = torch.tensor([len(row) for row in rows])[:, None]
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    place = torch.arange(length)
    counted = place.expand_as(ids) > 0 if padding_in_loss else (place > 0) & (place <= sizes)
    return Block(ids, place < sizes, counted)


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that pads, which for most models is that which ends a text.

    Raises:
        UserError: if there is neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("model: expected a tokenizer with a padding or an end token, got neither")


def new_optimizer(model: nn.Module, lr: float) -> Adafactor:
    """Adafactor as transformers' Trainer makes it of ``optim="adafactor"``."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    return Adafactor(parameters, lr=lr, scale_parameter=False, relative_step=False)


def token_loss(model: Any, block: Block, count: Tensor | int, bf16: bool) -> Tensor:
    """The sum of the NLL of the tokens that are predicted, over ``count``.

    Autocast ends with the forward: held across an optimizer step it would go on with casts of the
    weights from before it.
    """
    with torch.autocast(block.ids.device.type, torch.bfloat16, enabled=bf16):
        logits = model(
            input_ids=block.ids, attention_mask=block.real.long(), use_cache=False
        ).logits
    counted = block.counted[:, 1:]
    targets = block.ids[:, 1:][counted]
    return F.cross_entropy(logits[:, :-1][counted].float(), targets, reduction="sum") / count


def add_gradient(model: nn.Module, batch: Block, options: TrainOptions) -> float:
    """Adds the gradient of a batch's mean NLL to ``.grad``, and returns that NLL."""
    count = batch.counted.sum()
    size = options.micro_batch or len(batch.ids)
    total = 0.0
    for part in torch.arange(len(batch.ids)).split(size):
        loss = token_loss(model, batch.rows(part, batch.ids.device), count, options.bf16)
        loss.backward()
        total += float(loss.detach())
    return total


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of the texts in an epoch."""
    order = list(range(size))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return torch.tensor(order)


def train(
    model: nn.Module,
    block: Block,
    options: TrainOptions,
    seed: int,
    folder: Path | None = None,
    watch: Watch = lambda epoch: None,
    add_more: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Trains with a fresh optimizer and schedule; the model is left in evaluation mode.

    Args:
        seed: of the order of the texts.
        folder: of the checkpoint that it goes on from, if there is one.
        watch: is called before the first epoch, with 0, and after each with its number.
        add_more: is called in every step, with its number, to add to ``.grad`` what is wanted
            beside the texts' gradient.

    Returns:
        The mean loss of every epoch.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    device: torch.device = next(model.parameters()).device
    steps = -(-len(block.ids) // options.batch_size)
    optimizer = new_optimizer(model, options.lr)
    total = steps * options.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    losses = _resumed(folder, model, optimizer, schedule)
    model.eval()  # no dropout, which none of the models has anyway
    if not losses:
        watch(0)
    for epoch in range(len(losses), options.epochs):
        batches = epoch_order(len(block.ids), seed, epoch).split(options.batch_size)
        sums = 0.0
        for index in batches:
            loss = add_gradient(model, block.rows(index, device), options)
            sums += _finite(loss, epoch) * len(index)
            add_more(schedule.last_epoch)
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(sums / len(block.ids))
        watch(epoch + 1)
        every = options.checkpoint_epochs
        if folder is not None and every and (epoch + 1) % every == 0:
            parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
            state = {name: part.state_dict() for name, part in parts.items()} | {"losses": losses}
            write_whole(folder / CHECKPOINT_FILE, partial(torch.save, state))
    if folder is not None:
        (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    return losses


def _resumed(folder: Path | None, *parts: Any) -> list[float]:
    """Puts model, optimizer and schedule back to a checkpoint; the losses of its epochs."""
    if folder is None or not (folder / CHECKPOINT_FILE).is_file():
        return []
    state = torch.load(folder / CHECKPOINT_FILE, weights_only=True)
    for name, part in zip(("model", "optimizer", "schedule"), parts, strict=True):
        part.load_state_dict(state[name])
    losses: list[float] = state["losses"]
    return losses


def _finite(loss: float, epoch: int) -> float:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise FloatingPointError(f"loss: expected a finite one, got {loss} in epoch {epoch + 1}")
    return loss
