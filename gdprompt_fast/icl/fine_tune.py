"""Fine-tuning on demonstrations as the paper does it: keys and values, one text after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..models.architecture import check_ids
from .blocks import KeysOrValues, check_plain, keys_and_values

NORMS = {"l2": 2.0, "linf": float("inf")}
_EPSILON = 1e-6  # as fairseq and PyTorch have it


@contextmanager
def fine_tune(
    model: nn.Module,
    demonstrations: Sequence[Tensor],
    lr: float,
    *,
    clip: float | None = None,
    clip_norm: str = "l2",
) -> Iterator[nn.Module]:
    """The model after plain SGD on texts, one at a time and in their order; afterwards, also after
    an error, the model to the bit as it was.

        θ ← θ − η · min(1, clip / ‖g‖) g,    g = ∂/∂θ mean over t ≥ 1 of −log p(x_t | x_<t)

    θ are the weights and biases of all blocks' keys and values (``k_proj``, ``v_proj``, or their
    part of a layer that makes queries too), ‖g‖ is over all of them together.

    Args:
        model: a causal LM without adapters, its dropout off. No ``.grad`` is touched.
        demonstrations: int64 [T] each, T ≥ 2, the first token BOS: it is not predicted.
        lr: η, constant.
        clip: the largest norm of a gradient; None does not clip.
        clip_norm: "l2", or "linf", the largest absolute value.

    Raises:
        UserError: for adapters, an unknown family, active dropout, ids outside the vocabulary, a
            text of one token, an unknown norm, a rate or clip that is negative or not finite.
    """
    check_tuning(model, demonstrations, lr, clip, clip_norm)
    trained = [each for of_block in keys_and_values(model) for each in of_block]
    with restored(trained):
        with trains_only(model, trained):
            for ids in demonstrations:
                gradients = gradients_of(next_token_loss(model, ids), trained)
                descend(trained, gradients, lr, clip, clip_norm)
        yield model


def check_tuning(
    model: nn.Module,
    demonstrations: Sequence[Tensor],
    lr: float,
    clip: float | None = None,
    clip_norm: str = "l2",
) -> None:
    """
    Raises:
        UserError: what :func:`fine_tune` says.
    """
    check_plain(model)
    numbers = {"lr": lr} if clip is None else {"lr": lr, "clip": clip}
    for name, number in numbers.items():
        if not 0 <= number < float("inf"):
            raise UserError(f"{name}: expected a number >= 0, got {number}")
    if clip_norm not in NORMS:
        raise UserError(f"clip_norm: expected one of {', '.join(NORMS)}, got {clip_norm!r}")
    for ids in demonstrations:
        if ids.dtype != torch.int64 or ids.dim() != 1 or len(ids) < 2:
            raise UserError(
                "demonstrations: expected int64 [T] of 2 tokens at least, got "
                f"{ids.dtype} {[*ids.shape]}"
            )
        check_ids("demonstrations", ids[None], model)


def next_token_loss(model: Any, ids: Tensor) -> Tensor:
    """Mean NLL of all tokens [T] of a text but the first."""
    return mean_nll(model(ids[None], use_cache=False).logits[0], ids)


def mean_nll(logits_TV: Tensor, ids: Tensor) -> Tensor:
    """Of the tokens after the first, predicted by the logits one position before."""
    return F.cross_entropy(logits_TV[:-1], ids[1:])


def gradients_of(loss: Tensor, trained: Sequence[KeysOrValues]) -> list[list[Tensor]]:
    """Of the parameters of each, zero where they make queries."""
    parameters = [each.parameters for each in trained]
    flat = iter(torch.autograd.grad(loss, [p for own in parameters for p in own]))
    gradients = [[next(flat) for _ in own] for own in parameters]
    return [each.only_rows(own) for each, own in zip(trained, gradients, strict=True)]


@torch.no_grad()
def descend(
    trained: Sequence[KeysOrValues],
    gradients: Sequence[Sequence[Tensor]],
    lr: float,
    clip: float | None,
    clip_norm: str,
) -> None:
    """One step of SGD, in place."""
    parameters = [parameter for each in trained for parameter in each.parameters]
    flat = [gradient for own in gradients for gradient in own]
    if clip is not None:
        norm = torch.nn.utils.get_total_norm(flat, NORMS[clip_norm])
        factor = (clip / (norm + _EPSILON)).clamp(max=1.0)
        flat = [gradient * factor for gradient in flat]
    for parameter, gradient in zip(parameters, flat, strict=True):
        parameter.add_(gradient, alpha=-lr)


@contextmanager
def restored(trained: Sequence[KeysOrValues]) -> Iterator[None]:
    """Afterwards the parameters have the values they had."""
    before = [(p, p.detach().clone()) for each in trained for p in each.parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


@contextmanager
def trains_only(model: nn.Module, trained: Sequence[KeysOrValues]) -> Iterator[None]:
    """Inside, these parameters alone require a gradient: a graph keeps nothing for others."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        for each in trained:
            for parameter in each.parameters:
                parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
