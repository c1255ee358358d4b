"""Kills at a given call, in the place of the end of the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` that works ``calls`` times and then kills."""
    left = [calls]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return function(*args, **kwargs)

    return wrapped
