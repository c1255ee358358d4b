"""The command line, ``gdprompt COMMAND``."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Any

from transformers.utils.logging import disable_progress_bar

from ..config.presets import read_config
from ..errors import UserError
from ..runs import COMMANDS, Command, run
from .arguments import DEBUG, parser_of

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 (failed on the way), 2 (bad input) or 130."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = DEBUG in arguments
    commands = {**COMMANDS, run.name: run}
    parser = parser_of(commands, "The command line, gdprompt COMMAND.")
    given = vars(parser.parse_args([each for each in arguments if each != DEBUG]))
    command = commands[given.pop("command")]
    disable_progress_bar()  # of transformers, for the writing of files: it would break ours
    _print_anything()
    try:
        return _prepare_and_work(command, given, debug)
    except KeyboardInterrupt:
        hint = f"; {command.continued_by}" if command.continued_by else ""
        print(f"\ngdprompt {command.name}: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED


def _print_anything() -> None:
    """No character that the terminal's encoding lacks ends a command before it has written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _prepare_and_work(command: Command[Any, Any], given: dict[str, Any], debug: bool) -> int:
    try:
        work = command.begin(read_config(command.config, given, ""))
    except (UserError, OSError) as error:
        if debug:
            raise
        print(f"gdprompt {command.name}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    try:
        return 0 if command.succeeded(work()) else FAILED
    except (FloatingPointError, OSError, UserError) as error:
        if debug:
            raise
        print(f"gdprompt {command.name}: stopped: {error}", file=sys.stderr)
        return FAILED
