"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gdprompt_fast.meta.failures import found_on_the_device
from helpers.tape import on_tapes


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps are captured, on tapes that stand in for CUDA's graphs."""
    on_tapes(monkeypatch.setattr)
    with found_on_the_device():
        yield
