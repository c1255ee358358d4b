"""A guard against gradients that would be silently wrong."""

from __future__ import annotations

import torch

from ..errors import UserError


def forbid_higher_order(op: str, times: str) -> None:
    """Raises inside the last backward an op has, when the caller asks for a graph of it.

    ``once_differentiable`` is no such guard: autograd prunes its error node when the gradient is
    asked of an input that reaches the output another way, and returns a lower-order number without
    an error.
    """
    if torch.is_grad_enabled():  # only true under create_graph=True
        raise RuntimeError(
            f"{op} is differentiable {times} only, but its last backward ran under "
            "create_graph=True"
        )


def used_twice(layer: str) -> UserError:
    """The error for a layer whose inner gradient would be the sum over several uses."""
    return UserError(
        "model: expected every layer that the inner step moves to run once in a forward pass, got "
        f"{layer} used twice in one forward pass"
    )
