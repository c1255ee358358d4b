"""Preset files: settings by section."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from ..errors import UserError

FOLDER = Path(__file__).parent


def load_preset(name_or_path: str) -> dict[str, Any]:
    """The sections of a preset of this package, by its name, or of a TOML file, by its path.

    Raises:
        ValueError: if there is none, or it is not TOML.
    """
    own = FOLDER / f"{name_or_path}.toml"
    path = own if own.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise UserError(f"preset: expected a TOML file or one of {names}, got {name_or_path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"preset: expected TOML in {path}, got {error}") from None


def preset_arguments(name_or_path: str, section: str, known: list[str]) -> list[str]:
    """A section of a preset as arguments of a command, ``inner_lr = 0.1`` as ``--inner-lr 0.1``.

    Args:
        known: the options of the command, with underscores.

    Raises:
        ValueError: if there is no such section, or it has a key that is no option.
    """
    settings = load_preset(name_or_path).get(section)
    if not isinstance(settings, dict):
        raise UserError(f"preset: expected a section [{section}] in {name_or_path}, got none")
    arguments = []
    for name, value in settings.items():
        if name not in known:
            raise UserError(
                f"preset: expected in [{section}] of {name_or_path} only {', '.join(known)}, "
                f"got {name}"
            )
        values = value if isinstance(value, list) else [value]
        arguments += ["--" + name.replace("_", "-"), *map(str, values)]
    return arguments
