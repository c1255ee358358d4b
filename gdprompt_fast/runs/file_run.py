"""``gdprompt run``: one TOML file of commands, a section each, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import REQUIRED, CommandConfig, option
from ..config.presets import load_toml, read_config
from ..distributed.group import barrier
from ..errors import UserError
from .command import command
from .commands import COMMANDS


@dataclass(frozen=True, kw_only=True)
class RunConfig(CommandConfig):
    """Which file to run."""

    command = "run"

    file: Path = option(
        REQUIRED,
        "TOML file: [COMMAND] with the command's options as keys, as inner_lr = 0.1; [[COMMAND]] "
        "for each of several",
        reads=True,
        positional=True,
    )


@command(
    "Run the commands of a TOML file, one after another. All of the file is checked first; the "
    "same file goes on where it stopped if its sections say resume = true.",
    continued_by="sections with resume = true continue their runs",
    shared=True,
)
def run(config: RunConfig) -> Callable[[], list[Any]]:
    """Reads the file, and prepares its first command; the work is to run all of them, and returns
    their results.
    """
    configs = read_run_file(config.file)
    first = _begin(config.file, configs[0])

    def work() -> list[Any]:
        results = []
        for index, each in enumerate(configs):
            todo = first if index == 0 else _begin(config.file, each)
            results.append(todo())
            barrier()  # a command may read what the one before has written
            if not COMMANDS[each.command].succeeded(results[-1]):
                raise UserError(f"{config.file}, [{each.command}]: expected success, got a failure")
        return results

    return work


def read_run_file(path: Path) -> list[CommandConfig]:
    """The configurations of the commands in a file, in its order.

    Raises:
        UserError: naming the file, the section and the key, what was expected and what was given.
    """
    if not path.is_file():
        raise UserError(f"file: expected a TOML file, got {path}")
    configs = []
    for name, section in load_toml(path, "file").items():
        if name not in COMMANDS:
            raise UserError(f"{path}: expected sections among {list(COMMANDS)}, got [{name}]")
        for each in section if isinstance(section, list) else [section]:
            configs.append(read_config(COMMANDS[name].config, each, f"{path}, [{name}]"))
    if not configs:
        raise UserError(f"{path}: expected sections among {list(COMMANDS)}, got none")
    return configs


def _begin(path: Path, config: CommandConfig) -> Callable[[], Any]:
    try:
        return COMMANDS[config.command].begin(config)
    except UserError as error:
        raise UserError(f"{path}, [{config.command}]: {error}") from error
