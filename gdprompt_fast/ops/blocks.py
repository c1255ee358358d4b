"""Loops over a long dimension, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_abridged = False


@contextmanager
def abridged_loops() -> Iterator[None]:
    """Inside, a loop takes its last three blocks only: for planning memory, where nothing is
    computed.

    The peak is theirs: every full block but the first needs the same, or more the later it comes
    (causal attention), and the last may be smaller.
    """
    global _abridged
    before, _abridged = _abridged, True
    try:
        yield
    finally:
        _abridged = before


def block_ranges(total: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) of every block of ``size`` elements, of which the last may have fewer."""
    starts = range(0, total, size)[-3:] if _abridged else range(0, total, size)
    return [(start, min(start + size, total)) for start in starts]
