"""The command line, ``gdprompt COMMAND``."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from transformers.utils.logging import disable_progress_bar

from ..config.presets import read_config
from ..distributed.group import first_to_fail, launched, rank, world_size
from ..distributed.watch import ProcessLost
from ..errors import UserError
from ..runs import COMMANDS, Command, run
from .arguments import DEBUG, parser_of

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 (failed on the way), 2 (bad input) or 130."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    disable_progress_bar()  # of transformers, for the writing of files: it would break ours
    _print_anything()
    with launched(), _first_prints() as errors:
        code = _run(arguments, errors)
        if code and world_size() > 1:
            raise SystemExit(code)  # nobody waits for the others
    return code


@contextmanager
def _first_prints() -> Iterator[TextIO]:
    """Of several processes the first prints; where errors go, of any."""
    errors = sys.stderr
    if rank() == 0:
        yield errors
        return
    with Path(os.devnull).open("w") as out, redirect_stdout(out), redirect_stderr(out):
        yield errors


def _print_anything() -> None:
    """No character that the terminal's encoding lacks ends a command before it has written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(arguments: list[str], errors: TextIO) -> int:
    debug = DEBUG in arguments
    commands = {**COMMANDS, run.name: run}
    parser = parser_of(commands, "The command line, gdprompt COMMAND.")
    given = vars(parser.parse_args([each for each in arguments if each != DEBUG]))
    command = commands[given.pop("command")]
    try:
        return _prepare_and_work(command, given, debug, errors)
    except KeyboardInterrupt as error:
        hint = f"; {command.continued_by}" if command.continued_by else ""
        if first_to_fail(error):
            print(f"\ngdprompt {command.name}: interrupted{hint}", file=errors, flush=True)
        return INTERRUPTED


def _prepare_and_work(
    command: Command[Any, Any], given: dict[str, Any], debug: bool, errors: TextIO
) -> int:
    def said(what: str, error: Exception, code: int) -> int:
        if debug:
            raise error
        if first_to_fail(error):
            print(f"gdprompt {command.name}: {what}: {error}", file=errors, flush=True)
        return code

    try:
        work = command.begin(read_config(command.config, given, ""))
    except (UserError, OSError, ProcessLost) as error:
        return said("error", error, BAD_INPUT)
    try:
        return 0 if command.succeeded(work()) else FAILED
    except (FloatingPointError, OSError, UserError, ProcessLost) as error:
        return said("stopped", error, FAILED)
