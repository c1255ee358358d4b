"""The gate of testing/gates.py on every output of a pass, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gdprompt_fast.testing import gates
from gdprompt_fast.testing.gates import relative_error, widened

FLOOR = {**gates.FLOOR, torch.float64: 1e-12}


def widen(values: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of a pass for its run in fp64."""
    return tuple(map(widened, values))


def assert_at_most_twice_eager(
    names: str | Sequence[str], fast: Sequence[Any], eager: Sequence[Any], gold: Sequence[Any]
) -> None:
    names = names.split() if isinstance(names, str) else names
    for name, ours, theirs, exact in zip(names, fast, eager, gold, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is None:
            continue
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        error, plain = relative_error(ours, exact), relative_error(theirs, exact)
        assert error <= 2 * plain + FLOOR[ours.dtype], f"{name}: {error:.2e}, eager {plain:.2e}"
