"""What a command is: a configuration, all that is checked before its long work, and the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_type_hints

from ..artifacts.files import recover
from ..artifacts.outputs import Outputs, check_differ, is_marked
from ..config.fields import CommandConfig, WritingConfig
from ..distributed.group import launched, world_size
from ..errors import UserError
from ..loading import base_on_disk

C = TypeVar("C", bound=CommandConfig)
R = TypeVar("R")


@dataclass(frozen=True)
class Command(Generic[C, R]):
    """A command, which Python calls with its configuration; the command line and files do too.

    Attributes:
        config: the class of its configuration.
        what: what it does.
        prepare: checks all input, loads it, and returns the long work.
        continued_by: what continues it after an interruption; "": nothing does.
        succeeded: whether a result is what was asked for; the exit code follows from it.
        shared: whether several processes can share its work.
    """

    config: type[C]
    what: str
    prepare: Callable[[C], Callable[[], R]]
    continued_by: str = ""
    succeeded: Callable[[R], bool] = lambda result: True
    shared: bool = False

    @property
    def name(self) -> str:
        """On the command line, and of its section in files."""
        return self.config.command

    def begin(self, config: C) -> Callable[[], R]:
        """The long work of the command, with all that it reads checked and loaded.

        Raises:
            UserError: naming the field, what was expected and what was given.
        """
        if world_size() > 1 and not self.shared:
            raise UserError(
                f"{self.name}: expected one process, got {world_size()}: only train, evaluate "
                "and learn share their work among several"
            )
        for path in (config.paths("reads") | config.paths("writes")).values():
            recover(path)
            recover(path.parent)
        return self.prepare(config)

    def __call__(self, config: C) -> R:
        """Does all of it.

        Raises:
            UserError: naming the field, what was expected and what was given.
            FloatingPointError: if a loss or a gradient is not finite.
        """
        with launched():
            return self.begin(config)()


def command(
    what: str,
    continued_by: str = "",
    succeeded: Callable[[Any], bool] = lambda result: True,
    shared: bool = False,
) -> Callable[[Callable[[C], Callable[[], R]]], Command[C, R]]:
    """Makes a :class:`Command` of the function that prepares it; its only argument is of the type
    of the command's configuration.
    """

    def of(prepare: Callable[[C], Callable[[], R]]) -> Command[C, R]:
        config = next(iter(get_type_hints(prepare).values()))
        made = Command(config, what, prepare, continued_by, succeeded, shared)
        object.__setattr__(made, "__doc__", prepare.__doc__)
        return made

    return of


def outputs_of(config: WritingConfig) -> Outputs:
    """What a command must not write over; the file of dropped records is checked at once.

    Raises:
        UserError: if two outputs are the same, or that file is not the command's.
    """
    read, written = config.paths("reads"), config.paths("writes")
    inputs = {name: path for name, path in read.items() if path.exists()}
    models = [name for name in ("model", "teacher") if name in inputs]
    bases = {f"base of the {name}": base_on_disk(inputs[name]) for name in models}
    inputs |= {name: base for name, base in bases.items() if base is not None}
    check_differ(**written)
    outputs = Outputs(inputs, config.overwrite, written)
    mine = config.command
    outputs.check_file("dropped", written.get("dropped"), lambda path: is_marked(path, mine))
    return outputs
