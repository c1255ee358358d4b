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
    one, two, three = (tmp_path / "docs" / f"{name}.py" for name in ("one", "two", "three"))
    one.parent.mkdir()
    one.write_text("\n".join(lines))
    commented = "\n\n# why\n".join(f"{line}  # so" for line in lines).replace(" = ", "=")
    two.write_text(f"import ast\n{commented}\nb = 1\n")
    three.write_text("\n".join(lines[:5]))
    monkeypatch.setattr(repeated, "ROOT", tmp_path)
    (pair,) = repeated.repeated()
    assert pair == (7, f"docs/{one.name}:1", f"docs/{two.name}:2")
