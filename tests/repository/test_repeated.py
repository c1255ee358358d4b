"""Few places of the repository say what another says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from helpers.scripts import docs_script


@pytest.fixture(scope="module")
def repeated() -> ModuleType:
    return docs_script("repeated")


def test_few_pairs_of_places_share_six_lines(repeated: ModuleType) -> None:
    found = repeated.repeated()
    assert len(found) <= repeated.MOST_PAIRS, "see python docs/repeated.py"


def test_equal_lines_are_found_whatever_stands_between_them(
    repeated: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"a{i} = {i}" for i in range(7)]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.py").write_text("\n".join(lines))
    commented = "\n\n# why\n".join(f"{line}  # so" for line in lines).replace(" = ", "=")
    (tmp_path / "docs" / "two.py").write_text(f"import ast\n{commented}\nb = 1\n")
    (tmp_path / "docs" / "three.py").write_text("\n".join(lines[:5]))
    monkeypatch.setattr(repeated, "ROOT", tmp_path)
    assert repeated.repeated() == [repeated.Pair(7, "docs/one.py:1", "docs/two.py:2")]
