"""What an installed package promises: its names, its kernels' place, and a README that runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import gdprompt_fast

ROOT = Path(__file__).parents[1]


def test_the_public_names_are_there() -> None:
    for name in gdprompt_fast.__all__:
        assert getattr(gdprompt_fast, name).__doc__


def test_no_top_level_package_kernels_of_ours_is_imported() -> None:
    kernels = sys.modules.get("kernels")
    assert kernels is None or str(ROOT) not in str(getattr(kernels, "__path__", ""))


def test_the_example_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(code, {})
    assert float(capsys.readouterr().out) > 0
