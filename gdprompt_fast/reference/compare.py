"""Compares implementations of a meta step: their losses and every meta-gradient tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import MetaBatch
from ..errors import UserError
from ..meta.config import MetaStepOutput
from ..models.families import RMS_NORMS, type_name

Gradients = dict[str, Tensor]
Step = Callable[..., MetaStepOutput]


def gradients_of(
    step: Step, model: nn.Module, batch: MetaBatch, **options: Any
) -> tuple[MetaStepOutput, Gradients]:
    """Runs one step with all ``.grad`` cleared before, and returns its output and gradients."""
    model.zero_grad(set_to_none=True)
    out = step(model, batch, **options)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out, grads


def relative_errors(got: Gradients, expected: Gradients) -> dict[str, float]:
    """‖got − expected‖ / ‖expected‖ of every tensor.

    A tensor whose gradient is zero but for rounding (a key's bias does not change the attention) is
    measured against a millionth of the whole gradient's norm instead of its own.

    Raises:
        ValueError: if the two do not have gradients for the same parameters.
    """
    if got.keys() != expected.keys():
        raise UserError(
            f"gradients: expected them for the same parameters, got {got.keys() ^ expected.keys()}"
        )
    whole = torch.stack([g.double().norm() for g in expected.values()]).norm()
    return {
        name: float(
            (got[name].double() - g.double()).norm()
            / torch.maximum(g.double().norm(), 1e-6 * whole)
        )
        for name, g in expected.items()
    }


def worst_error(got: Gradients, expected: Gradients) -> tuple[float, str]:
    """The largest relative error and the parameter it is at."""
    errors = relative_errors(got, expected)
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@contextmanager
def without_upcasts(model: nn.Module) -> Iterator[None]:
    """Inside, the RMSNorms of the known families compute in the dtype of their input.

    transformers upcasts them to fp32 whatever the input, which in fp64 is a downcast: it limits the
    reference to about 1e-7. The rotary tables are fp32 too, but are the same numbers in every
    implementation.
    """
    classes = {type(m) for m in model.modules() if type_name(m) in RMS_NORMS}
    before = {c: c.forward for c in classes}
    try:
        for c in classes:
            c.forward = _rms_norm
        yield
    finally:
        for c, forward in before.items():
            c.forward = forward
