"""What a preset file says of these experiments: sizes, rates, tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..config.fields import Config, check_counts, check_numbers, from_section
from ..errors import UserError
from ..experiments import preset as experiments
from .tasks import TASKS

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class ModelOptions(experiments.ModelOptions):
    """The section ``[model]``.

    Attributes:
        seeds: every seed is a repetition; it is added to the seed of each task, and is the number
            of the demonstrations' permutation.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.seeds) < 0:
            raise UserError(f"seeds: expected integers >= 0, got {list(self.seeds)}")


@dataclass(frozen=True)
class PromptOptions(Config):
    """The section ``[prompt]``.

    Attributes:
        demonstrations: k, of a task.
        window: rows are shorter than so many tokens.
        bos, eos: tokens that open a row and end a demonstration; None: the tokenizer's.
    """

    demonstrations: int
    window: int = 2048
    bos: str | None = None
    eos: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "demonstrations", "window")


@dataclass(frozen=True)
class EvaluateOptions(Config):
    """The section ``[evaluate]``.

    Attributes:
        batch_size: queries at once.
        examples: the most of a task's evaluation set, the first of it; None: all.
        control_examples: the most for the controls (an untrained model, a random update, rate 0);
            None: as many as for the rest.
    """

    batch_size: int
    examples: int | None = None
    control_examples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "batch_size")
        for name in ("examples", "control_examples"):
            if getattr(self, name) is not None:
                check_counts(self, name, least=2)


@dataclass(frozen=True)
class TaskOptions(Config):
    """The section ``[tasks.NAME]``.

    Attributes:
        seed: of the demonstrations, with a repetition's added.
        lr: the rate of fine-tuning on them.
        file, test_file: to read it from, as ``tasks.py`` has it; None: from the hub.
    """

    seed: int
    lr: float
    file: str | None = None
    test_file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "seed", least=0)
        check_numbers(self, "lr", above_zero=True)


@dataclass(frozen=True)
class Preset:
    """A preset file, checked; an attribute is the section of its name."""

    sections: dict[str, Any]
    model: ModelOptions
    prompt: PromptOptions
    evaluate: EvaluateOptions
    tasks: dict[str, TaskOptions] = field(default_factory=dict)

    @staticmethod
    def read(sections: Mapping[str, Any]) -> Preset:
        """The preset in nested dictionaries, as a TOML file gives them.

        Raises:
            UserError: naming the section and what is wrong in it.
        """
        tasks = sections.get("tasks")
        if not isinstance(tasks, dict) or not tasks or not {*tasks} <= {*TASKS}:
            raise UserError(
                f"preset: expected sections [tasks.NAME] of {', '.join(TASKS)}, got {tasks!r}"
            )
        return Preset(
            dict(sections),
            _read("model", ModelOptions, sections),
            _read("prompt", PromptOptions, sections),
            _read("evaluate", EvaluateOptions, sections),
            {name: _read(name, TaskOptions, tasks, within="tasks.") for name in tasks},
        )

    def section(self, name: str, config: type[C]) -> C:
        """An experiment's own section.

        Raises:
            UserError: naming the section and what is wrong in it.
        """
        read = _read(name, config, self.sections)
        for task in getattr(read, "tasks", ()):
            if task not in self.tasks:
                raise UserError(
                    f"preset, [{name}]: tasks: expected among {sorted(self.tasks)}, got {task!r}"
                )
        return read


def _read(name: str, config: type[C], sections: Mapping[str, Any], within: str = "") -> C:
    return from_section(config, sections.get(name), f"preset, [{within}{name}]")
