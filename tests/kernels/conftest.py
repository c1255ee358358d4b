"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: an element that no kernel writes shows."""
    torch.manual_seed(0)
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def poisoned(*args: Any, plain: Callable[..., Tensor] = plain, **kwargs: Any) -> Tensor:
            fresh = plain(*args, **kwargs)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        monkeypatch.setattr(torch, name, poisoned)
