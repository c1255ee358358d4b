"""What the ops of one meta step share: which backward is running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Phase:
    """Where a meta step is.

    Attributes:
        second_order: whether the outer gradient goes through the inner step.
        inner_backward: the backward of an inner step is running, which records inner gradients;
            otherwise it is the last one, which adds to ``.grad``.
        recomputing: memory is dearer than time: what can be made again is not kept.
        replaying: an inner backward runs again, for its graph: its inner gradients are recorded.
    """

    def __init__(self, second_order: bool) -> None:
        self.second_order = second_order
        self.inner_backward = False
        self.replaying = False
        self.recomputing = False

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
