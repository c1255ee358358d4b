"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def poisoned(poisoned_empty: None) -> None:
    """For every test of a kernel."""
