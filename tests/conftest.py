"""What pytest's processes are set to; the fixtures are in ``helpers/fixtures.py``."""

from __future__ import annotations

import gc
import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton, torch's own too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in processes that tests start
os.environ.setdefault("HYPOTHESIS_NO_PLUGINS", "1")  # trio's has all objects looked at
gc.disable()  # until all tests are collected


def pytest_configure(config: pytest.Config) -> None:
    """The process that only hands tests out to others needs no fixture, and no torch for them."""
    if config.getoption("dist") == "no" or config.option.collectonly:
        config.pluginmanager.import_plugin("helpers.fixtures")


def pytest_collection_finish() -> None:
    """What is there now stays, half a million objects: no collection looks at them again."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()
