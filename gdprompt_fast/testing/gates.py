"""The gate: a faster pass may be off by twice what the plain one is off by, plus a floor.

    ‖got − exact‖ / ‖exact‖  ≤  2 ‖plain − exact‖ / ‖exact‖ + floor

``exact`` is the plain pass in fp64, so that what is allowed follows from the dtype's own rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


def relative_error(got: Tensor, exact: Tensor, negligible: float | None = None) -> float:
    """‖got − exact‖ / ‖exact‖ in fp64.

    Args:
        negligible: a truth of a norm up to this counts as zero, and the error is then ‖got‖ itself;
            None: whatever is not zero where the truth is has an error without bounds.
    """
    got, exact = got.detach(), exact.detach()
    norm = exact.norm()
    if negligible is not None and norm <= negligible:
        return float(got.double().norm())
    return float((got.double() - exact).norm() / norm.clamp(min=1e-30))


def widened(value: Any) -> Any:
    """An argument of a pass for its run in fp64."""
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def copied(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of their own for a pass that writes to them."""
    return tuple(
        copied(value)
        if isinstance(value, tuple)
        else value.clone()
        if isinstance(value, Tensor)
        else value
        for value in values
    )


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among the results of a pass, or its arguments."""
    values = values if isinstance(values, tuple | list) else (values,)
    return [value for value in values if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Verdict:
    """What a gate says.

    Attributes:
        error, plain_error, allowed: of the output that is nearest to what is allowed, or furthest
            above it.
        status: ``"passed"``, or ``"failed: …"`` with the reason.
    """

    error: float | None
    plain_error: float | None
    allowed: float | None
    status: str


def judge(got: Any, plain: Any, exact: Any) -> Verdict:
    """The gate on the results of a pass, of the plain pass, and of the plain pass in fp64."""
    worst = Verdict(None, None, None, "failed: a pass without a tensor")
    worst_excess = -math.inf
    for fast, slow, true in zip(*map(tensors_in, (got, plain, exact)), strict=True):
        if (fast.shape, fast.dtype, fast.device) != (slow.shape, slow.dtype, slow.device):
            what = f"failed: {fast.dtype} {list(fast.shape)}, not as the plain pass"
            return Verdict(None, None, None, what)
        error, plain_error = relative_error(fast, true), relative_error(slow, true)
        allowed = 2 * plain_error + FLOOR.get(fast.dtype, 1e-6)
        # A NaN is not below anything: it counts as infinite.
        excess = error / allowed if math.isfinite(error) else math.inf
        if excess > worst_excess:
            status = "passed" if excess <= 1 else "failed: error above the allowed"
            worst, worst_excess = Verdict(error, plain_error, allowed, status), excess
    return worst


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, fresh memory holds NaN: an element that no pass writes shows."""
    owners = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))
    patches = [patch.object(owner, name, _poisoned(getattr(owner, name))) for owner, name in owners]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def _poisoned(empty: Any) -> Any:
    def poisoned(*args: Any, **options: Any) -> Tensor:
        fresh: Tensor = empty(*args, **options)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

    return poisoned
