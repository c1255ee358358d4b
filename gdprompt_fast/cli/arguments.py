"""The command line's options, made from the fields of the commands' configurations."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from ..config.fields import CommandConfig, hints, kind_of, required
from ..runs import Command

DEBUG = "--debug"  # of every command: shows the traceback of an error


def parser_of(
    commands: Mapping[str, Command[Any, Any]], description: str
) -> argparse.ArgumentParser:
    """A parser whose result has ``command``, and of the options those alone that were given."""
    epilog = f"{DEBUG} after any command shows the traceback of an error."
    parser = argparse.ArgumentParser(prog="gdprompt", description=description, epilog=epilog)
    added = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        of_command = added.add_parser(
            name,
            help=command.what,
            description=command.what,
            epilog=epilog,
            argument_default=argparse.SUPPRESS,
        )
        for field in fields(command.config):
            if field.metadata["on_command_line"]:
                _add(of_command, command.config, field)
    return parser


def _add(parser: argparse.ArgumentParser, config: type[CommandConfig], field: Field[Any]) -> None:
    kind, many, _ = kind_of(hints(config)[field.name])
    about = field.metadata
    option = "--" + field.name.replace("_", "-")
    arguments: dict[str, Any] = {"help": about["help"]}
    if not required(field):
        arguments["help"] += f" (default: {field.default})"
    if kind is bool:
        flag = argparse.BooleanOptionalAction if field.default else "store_true"
        parser.add_argument(option, action=flag, **arguments)
        return
    arguments |= {"type": kind, "choices": about["choices"], "metavar": about["metavar"]}
    if many:
        arguments["nargs"] = "+"
    if about["positional"]:
        arguments |= {} if required(field) else {"nargs": "?"}
        parser.add_argument(field.name, **arguments)
    else:
        parser.add_argument(option, required=required(field), **arguments)
