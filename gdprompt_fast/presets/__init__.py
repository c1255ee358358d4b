"""Preset files: settings by section."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


def load_preset(name_or_path: str) -> dict[str, Any]:
    """The sections of a preset of this package, by its name, or of a TOML file, by its path.

    Raises:
        ValueError: if there is none, or it is not TOML.
    """
    own = Path(__file__).parent / f"{name_or_path}.toml"
    path = own if own.is_file() else Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"preset: expected a preset's name or a TOML file, got {name_or_path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"preset: expected TOML in {path}, got {error}") from None
