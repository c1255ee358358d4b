"""Handles: tensors without elements that stand for weights in autograd (docs/autograd.md).

They carry edges. Their gradient is None in the last backward, where only the order counts; it is a
handle too in an inner backward, which is differentiated again.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from torch.autograd import Function


class GradientSum(Protocol):
    """Where the outer gradient of a parameter is summed beside autograd."""

    def take(self) -> Tensor | None:
        """What autograd is to be given of it; None for nothing."""
        ...


def weight_handle(*parameters: tuple[Tensor, GradientSum | None]) -> Tensor:
    """The handle of some parameters at θ, and of the rate that moves them: depends on those that
    are trained, has no elements.

    The last backward through it, after all uses, hands autograd the gradients the uses have summed.
    """
    trained = [(each, gradient) for each, gradient in parameters if gradient is not None]
    if not trained:
        return parameters[0][0].new_empty(0).requires_grad_()
    return _WeightHandle.apply(
        [gradient for _, gradient in trained], *(each for each, _ in trained)
    )


class _WeightHandle(Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[GradientSum], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return parameters[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> Any:
        return None, *(gradient.take() for gradient in ctx.gradients)


def depend_on(handle: Tensor, gradient: Tensor) -> Tensor:
    """The handle after an inner step: what uses it depends on the handle before and on the inner
    backward, whose output for that handle ``gradient`` is.
    """
    return _DependOn.apply(handle, gradient)


class _DependOn(Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, gradient: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return handle.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> Any:
        return None, None
