"""Backends of tests."""

from __future__ import annotations

import pytest

from gdprompt_fast.ops import backend


def only_kernels(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """Of the backend "triton" only these ops have kernels, and no choice is remembered."""
    monkeypatch.setattr(backend, "KERNELS", frozenset(ops))
    anew = backend._chosen_implementation.__wrapped__
    monkeypatch.setattr(backend, "_chosen_implementation", anew)
