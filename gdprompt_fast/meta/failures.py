"""Failures of a step: what they leave behind, and how they are said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import UserError


@contextmanager
def clean_after_error(model: nn.Module) -> Iterator[None]:
    """A failed step leaves no ``.grad`` where there was none."""
    without_grad = [p for p in model.parameters() if p.grad is None]
    try:
        with nothing_changed_in_place():
            yield
    except BaseException:
        for parameter in without_grad:
            parameter.grad = None
        raise


@contextmanager
def nothing_changed_in_place() -> Iterator[None]:
    """A hook may change in place what the model keeps no copy of, but the engine does.

    Raises:
        UserError: where autograd found a tensor of a step changed.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"in-?place operation", str(error)):
            raise
        raise UserError(
            "model: expected modules and hooks that leave their inputs as they are, got one that "
            f"changes what a step still needs: {error}"
        ) from error


def check_inner_loss(loss_G: Tensor, step: int, first_group: int = 0) -> None:
    """A NaN or infinite inner loss would poison every meta-gradient; stop while ``.grad`` is
    untouched.
    """
    bad = ~torch.isfinite(loss_G)
    if bad.any():
        group = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"inner loss: expected a finite number, got {float(loss_G[group])} "
            f"for group {first_group + group} at inner step {step + 1}"
        )
