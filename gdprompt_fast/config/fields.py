"""Configurations as frozen dataclasses whose fields say all about themselves.

The command line, the TOML files and Python all read the same fields: a field's help and choices,
whether it names a file to read or to write, and whether it may differ when a run is continued.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import UserError

REQUIRED = MISSING  # the default of a field that must be given
KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    Path: "a path",
    dict: "a table",
}

C = TypeVar("C")


def option(
    default: Any,
    what: str,
    choices: tuple[str, ...] | None = None,
    *,
    reads: bool = False,
    writes: bool = False,
    may_change: bool = False,
    on_command_line: bool = True,
    positional: bool = False,
    metavar: str | None = None,
    init: bool = True,
) -> Any:
    """A field of a configuration.

    Args:
        default: ``REQUIRED`` if there is none.
        what: its help text.
        choices: the values that it may have; None: any of its type.
        reads: it names a file or folder that is read, which nothing is written over.
        writes: it names a file or folder that is written.
        may_change: it may differ in the run that is continued with ``resume``.
        on_command_line: whether the command line has it; files and Python always do.
        positional: the command line takes it without its name.
        metavar: what the command line's help calls its value.
        init: False: only :mod:`gdprompt_fast.config.presets` sets it.
    """
    metadata = {
        "help": what,
        "choices": choices,
        "reads": reads,
        "writes": writes,
        "may_change": may_change,
        "on_command_line": on_command_line,
        "positional": positional,
        "metavar": metavar,
    }
    return field(default=default, metadata=metadata, init=init)


@dataclass(frozen=True)
class Config:
    """A configuration: checks the types and choices of its fields when it is made.

    A text serves where a path is expected, a list where a tuple is, an integer where a number is.

    Raises:
        UserError: naming the field, what was expected and what was given.
    """

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            value = converted(name, getattr(self, name), hint)
            object.__setattr__(self, name, value)
        for each in fields(self):
            choices, given = each.metadata.get("choices"), getattr(self, each.name)
            if choices is not None and given not in choices:
                raise UserError(f"{each.name}: expected one of {choices}, got {given!r}")

    def part(self, config: type[C]) -> C:
        """The fields that ``config``, one of this class's bases, has, as a configuration alone."""
        names = [each.name for each in fields(config) if each.init]  # type: ignore[arg-type]
        return config(**{name: getattr(self, name) for name in names})

    def lasting(self) -> dict[str, Any]:
        """The fields that a continued run must have in common with the one that it continues."""
        kept = [each.name for each in fields(self) if not each.metadata.get("may_change")]
        return {name: getattr(self, name) for name in kept}


@dataclass(frozen=True, kw_only=True)
class CommandConfig(Config):
    """The configuration of a command.

    Attributes:
        command: the command's name on the command line, and its section in files.
        preset_section: the section of a preset that gives it defaults; "": it takes no preset.
    """

    command: ClassVar[str]
    preset_section: ClassVar[str] = ""

    def paths(self, kind: str) -> dict[str, Path]:
        """The files and folders that it names, by field.

        Args:
            kind: "reads" or "writes"; a model to read may be a name on the hub instead.
        """
        given: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name) if each.metadata[kind] else None
            if isinstance(value, tuple):
                given |= {f"{each.name} {number}": path for number, path in enumerate(value, 1)}
            elif value is not None:
                given[each.name] = value
        return {name: Path(value) for name, value in given.items()}

    def settings(self) -> dict[str, Any]:
        """What a run must have in common with the one that it continues, for JSON."""
        values = {name: _for_json(value) for name, value in self.lasting().items()}
        return {"command": self.command, **values}


@dataclass(frozen=True, kw_only=True)
class WritingConfig(CommandConfig):
    """The configuration of a command that writes files."""

    overwrite: bool = option(False, "replace what this command did not write", may_change=True)


def _for_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_for_json(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def hints(config: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields, by name."""
    return _evaluated(config)


@cache
def _evaluated(config: type) -> Mapping[str, Any]:
    """Once a class: a parser asks for every option."""
    found = get_type_hints(config)
    return {each.name: found[each.name] for each in fields(config)}


def required(each: Field[Any]) -> bool:
    """Whether a field has no default."""
    return each.default is MISSING and each.default_factory is MISSING


def kind_of(hint: Any) -> tuple[type, bool, bool]:
    """The type that a field's values have, whether there are many, and whether None is one."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    (own,) = (each for each in members if each is not type(None))
    many = get_origin(own) is tuple
    kind = get_args(own)[0] if many else get_origin(own) or own
    return kind, many, type(None) in members


def converted(name: str, value: Any, hint: Any) -> Any:
    """The value of a field in the field's type.

    Raises:
        UserError: naming the field, what was expected and what was given.
    """
    kind, many, optional = kind_of(hint)
    if kind not in KINDS or (value is None and optional):
        return value
    if many:
        if not isinstance(value, list | tuple):
            raise UserError(f"{name}: expected a list, each {KINDS[kind]}, got {value!r}")
        return tuple(converted(name, each, kind) for each in value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
        raise UserError(f"{name}: expected {KINDS[kind]}, got {value!r}")
    return value


def from_section(config: type[C], section: Any, where: str) -> C:
    """A dataclass from the table of a file.

    Args:
        where: the file and the section, for errors; "": none.

    Raises:
        UserError: naming file, section and key, what was expected and what was given.
    """
    values = checked(config, section, where)
    for each in fields(config):  # type: ignore[arg-type]
        if each.init and required(each) and each.name not in values:
            raise UserError(f"{where}: expected the key {each.name!r}, got only {sorted(values)}")
    try:
        return config(**values)
    except UserError as error:
        raise _placed(error, where) from None


def _placed(error: UserError, where: str) -> UserError:
    return UserError(f"{where}: {error}") if where else error


def checked(config: type, section: Any, where: str) -> dict[str, Any]:
    """The values in a table of a file, in the types of the dataclass's fields of these names.

    Raises:
        UserError: naming file, section and key, what was expected and what was given.
    """
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: expected such a section, got {section!r}")
    known = sorted(each.name for each in fields(config) if each.init)
    values = {}
    for key, value in section.items():
        if key not in known:
            raise UserError(f"{where}: expected keys among {known}, got {key!r}")
        try:
            values[key] = converted(key, value, hints(config)[key])
        except UserError as error:
            raise _placed(error, where) from None
    return values


def check_counts(config: Any, *names: str, least: int = 1) -> None:
    """That these fields hold integers >= ``least``.

    Raises:
        UserError: naming the field, what was expected and what was given.
    """
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name}: expected an integer >= {least}, got {value!r}")


def check_numbers(config: Any, *names: str, above_zero: bool) -> None:
    """That these fields hold finite numbers, > 0 or >= 0.

    Raises:
        UserError: naming the field, what was expected and what was given.
    """
    for name in names:
        value = getattr(config, name)
        if not (0 < value < math.inf or (value == 0 and not above_zero)):
            sign = ">" if above_zero else ">="
            raise UserError(f"{name}: expected a number {sign} 0, got {value}")
