"""The TOML files: a section a command, whose keys are the fields of the command's configuration.

A preset is such a file too, with sections that say only some of the fields: defaults for a command.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from ..presets import FOLDER
from .fields import CommandConfig, checked, converted, from_section

C = TypeVar("C", bound=CommandConfig)


def load_toml(path: Path, option: str) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        UserError: naming the option and the file, if it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{option}: expected TOML in {path}, got {error}") from None


def load_preset(name_or_path: str) -> dict[str, Any]:
    """The sections of a preset of this package, by its name, or of a TOML file, by its path.

    Raises:
        UserError: if there is none, or it is not TOML.
    """
    own = FOLDER / f"{name_or_path}.toml"
    path = own if own.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise UserError(f"preset: expected a TOML file or one of {names}, got {name_or_path}")
    return load_toml(path, "preset")


def read_config(config: type[C], given: Any, where: str) -> C:
    """The configuration of a command from what was given, over the section of the ``preset`` that
    is named there, if the command takes one.

    Args:
        given: values by field.
        where: where it was given, for errors; "": on the command line.

    Raises:
        UserError: naming the place and the key, what was expected and what was given.
    """
    if not config.preset_section or not isinstance(given, Mapping) or "preset" not in given:
        return from_section(config, given, where)
    own = {key: value for key, value in given.items() if key != "preset"}
    name = converted("preset", given["preset"], str)
    place = f"preset: {name}, [{config.preset_section}]"
    defaults = checked(config, load_preset(name).get(config.preset_section), place)
    made = from_section(config, {**defaults, **own}, where)
    object.__setattr__(made, "preset", name)
    return made
