"""Fields of a configuration that are also options of the command line."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any

from ..errors import UserError


def option(default: Any, what: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field that is also a command-line option, with its help text."""
    return field(default=default, metadata={"help": what, "choices": choices})


def check_integers(options: Any) -> None:
    """That every field of a dataclass that is an integer has one.

    Raises:
        ValueError: naming the option.
    """
    for each in fields(options):
        value = getattr(options, each.name)
        if each.type == "int" and not isinstance(value, int):
            raise UserError(f"{each.name}: expected an integer, got {value!r}")
