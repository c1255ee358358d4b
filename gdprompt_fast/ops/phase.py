"""What the ops of one meta step share: which backward is running, and the handles of their
weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd import Function

from .gradient import WeightGradient


class Phase:
    """Where a meta step is.

    Attributes:
        second_order: whether the outer gradient goes through the inner step.
        inner_backward: the backward of an inner step is running, which records inner gradients;
            otherwise it is the last one, which adds to ``.grad``.
        replaying: an inner backward runs again, for its graph: its inner gradients are recorded.
    """

    def __init__(self, second_order: bool) -> None:
        self.second_order = second_order
        self.inner_backward = False
        self.replaying = False

    @contextmanager
    def inner(self) -> Iterator[None]:
        self.inner_backward = True
        try:
            yield
        finally:
            self.inner_backward = False

    @contextmanager
    def replay(self) -> Iterator[None]:
        self.replaying = True
        try:
            yield
        finally:
            self.replaying = False


def handle_like(handle: Tensor) -> Tensor:
    """The gradient of a handle: it has no elements either."""
    return handle.new_empty(0)


def weight_handle(*weights: tuple[Tensor, WeightGradient | None]) -> Tensor:
    """The handle of some parameters at θ: depends on those that are trained, has no elements.

    The last backward through it, after all uses, hands autograd the gradients the uses have summed.
    """
    trained = [(weight, gradient) for weight, gradient in weights if gradient is not None]
    if not trained:
        return weights[0][0].new_empty(0).requires_grad_()
    return _WeightHandle.apply(
        [gradient for _, gradient in trained], *(weight for weight, _ in trained)
    )


class _WeightHandle(Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[WeightGradient], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return None, *(gradient.take() for gradient in ctx.gradients)
