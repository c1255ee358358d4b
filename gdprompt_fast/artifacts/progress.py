"""One kind of progress bar for everything that takes time."""

from __future__ import annotations

import sys

from tqdm import tqdm

from ..distributed.group import rank


def progress_bar(
    total: int, what: str, unit: str, done: int = 0, leave: bool = True, delay: float = 0.0
) -> tqdm:
    """A bar on stderr, after ``delay`` seconds; where that is no terminal, a line every ten. Of
    several processes the first shows one.
    """
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        leave=leave,
        delay=delay,
        mininterval=interval,
        dynamic_ncols=True,
        disable=rank() > 0,
    )
