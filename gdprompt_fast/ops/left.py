"""Cotangents that a double backward leaves for the last backward of the same op.

Autograd would add what both bring for the op's inputs, in a pass of its own. Instead the op has one
more output, an anchor without elements. Its inner backward takes the anchor in the place of the
inputs, so autograd runs the double backward before the op's last backward, which adds to what it
finds here in the pass that it makes anyway.
"""

from __future__ import annotations

from torch import Tensor


class Left:
    """What one use of an op hands from its double backward to its last backward."""

    def __init__(self) -> None:
        self._cotangents: tuple[Tensor, ...] | None = None

    def put(self, *cotangents: Tensor) -> None:
        """Fresh tensors, which may be written to."""
        self._cotangents = cotangents

    def take(self) -> tuple[Tensor, ...] | None:
        """What was left, once; None if there is nothing."""
        cotangents, self._cotangents = self._cotangents, None
        return cotangents
