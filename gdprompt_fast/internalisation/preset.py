"""What a preset file says of these experiments: models, data, stages of training, seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..config.fields import Config, check_counts, from_section
from ..errors import UserError
from .material.texts import ATTRIBUTION
from .train import TrainOptions

PEOPLE, TRIPLES, NUMBERS = SOURCES = ("people", "triples", "numbers")
SEEDS = "seeds"  # of an experiment, in the place of the preset's

C = TypeVar("C")


@dataclass(frozen=True)
class ModelOptions(Config):
    """The section ``[model]``: where pretrained experiments begin, and the repetitions.

    Attributes:
        name: a folder, or a name on the hub.
        seeds: of the material and of the first stage's order.
        revision: of the model on the hub.
        dtype: of the weights.
    """

    name: str
    seeds: tuple[int, ...]
    revision: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seeds(self.seeds)


@dataclass(frozen=True)
class TableOptions(Config):
    """The sections ``[people]`` and ``[triples]``: a table of entities.

    Attributes:
        entities: how many of it.
        file: the table; None: it has to be given.
        encoding: of the file.
    """

    entities: int
    file: str | None = None
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "entities")

    def path(self, section: str) -> Path:
        """The file.

        Raises:
            UserError: if there is none.
        """
        if self.file is None or not Path(self.file).is_file():
            raise UserError(
                f"files: expected {section}=FILE, a table that is there, got {self.file}"
            )
        return Path(self.file)


@dataclass(frozen=True)
class AskOptions(Config):
    """The section ``[ask]``: how a model is asked.

    Attributes:
        new_tokens: the longest answer.
        batch_size: questions at once.
        questions: the most of a test set, the first ones; None: all.
        attribution: the words of the questions on the entity itself.
    """

    new_tokens: int = 8
    batch_size: int = 64
    questions: int | None = None
    attribution: tuple[str, ...] = tuple(ATTRIBUTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "new_tokens", "batch_size")
        if self.questions is not None:
            check_counts(self, "questions")
        if unknown := sorted(set(self.attribution) - ATTRIBUTION.keys()):
            raise UserError(
                f"attribution: expected some of {list(ATTRIBUTION)}, got {unknown[0]!r}"
            )


@dataclass(frozen=True)
class SourceOptions(Config):
    """What an experiment on one source's texts may say of it.

    Attributes:
        source: ``"people"`` or ``"numbers"``.
        lists: the section with the sizes of numbers.
        entities: of people, in the place of those of ``[people]``.
        pretrained: the model for people, in the place of that of ``[model]``.
    """

    source: str = NUMBERS
    lists: str = "number-lists"
    entities: int | None = None
    pretrained: str | None = None


@dataclass(frozen=True)
class RunOptions(Config):
    """What the section of every experiment that is made of runs may say.

    Attributes:
        source: of its texts: ``"people"``, ``"triples"``, or ``"numbers"``, from scratch.
        lists: the section with the sizes of numbers, which has its own trainings.
        models: compared, in the place of that of ``[model]``.
        entities: in the place of those of ``[people]`` or ``[triples]``.
        stage2_seeds: runs of the second stage from every first one.
        fewer: by model or word order, the number of seeds, which are the section's first ones, and
            of second stages, of those that have others.
        new_tokens: of an answer, in the place of those of ``[ask]``.
        first, second, joint: training options over those of ``[stages.NAME]``.
    """

    source: str = PEOPLE
    lists: str = "number-lists"
    models: tuple[str, ...] = ()
    entities: int | None = None
    stage2_seeds: int = 1
    fewer: dict[str, list[int]] = field(default_factory=dict)
    new_tokens: int | None = None
    first: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)
    joint: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "stage2_seeds")
        for name in ("entities", "new_tokens"):
            if getattr(self, name) is not None:
                check_counts(self, name)
        for name, numbers in self.fewer.items():
            if len(numbers) != 2 or min(numbers) < 1:
                raise UserError(f"fewer: expected two integers >= 1 of {name}, got {numbers}")


@dataclass(frozen=True)
class Preset:
    """A preset file, checked section by section when it is asked for.

    Attributes:
        sections: the file itself, as nested dictionaries.
        model: the section ``[model]``.
        ask: the section ``[ask]``.
    """

    sections: dict[str, Any]
    model: ModelOptions
    ask: AskOptions

    @staticmethod
    def read(sections: Mapping[str, Any]) -> Preset:
        """The preset in nested dictionaries, as a TOML file gives them.

        Raises:
            UserError: naming the section and what is wrong in it.
        """
        for name, section in sections.items():
            if not isinstance(section, dict):
                raise UserError(f"preset: expected a section [{name}], got {section!r}")
        model = _read("model", ModelOptions, sections)
        return Preset(dict(sections), model, _read("ask", AskOptions, {"ask": {}} | dict(sections)))

    def section(self, name: str, config: type[C]) -> C:
        """An experiment's own section.

        Raises:
            UserError: naming the section and what is wrong in it.
        """
        its = self.sections.get(name)
        if isinstance(its, dict):
            its = {key: value for key, value in its.items() if key != SEEDS}
        return _read(name, config, {name: its})

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """The seeds of an experiment: its section's, or the preset's.

        Raises:
            UserError: if they are none, or not different integers.
        """
        seeds = self.sections.get(name, {}).get(SEEDS, self.model.seeds)
        try:
            return check_seeds(tuple(seeds))
        except (UserError, TypeError):
            raise UserError(
                f"preset, [{name}]: seeds: expected different integers, got {seeds!r}"
            ) from None

    def table(self, name: str) -> TableOptions:
        """``[people]`` or ``[triples]``."""
        return _read(name, TableOptions, self.sections)

    def training(self, stage: str, **over: Any) -> TrainOptions:
        """``[stages.STAGE]``, with what an experiment says over it.

        Raises:
            UserError: naming the section and what is wrong in it.
        """
        stages = self.sections.get("stages", {})
        own = stages.get(stage) if isinstance(stages, dict) else None
        if not isinstance(own, dict):
            raise UserError(f"preset: expected a section [stages.{stage}], got {own!r}")
        return _read(f"stages.{stage}", TrainOptions, {f"stages.{stage}": own | over})


def changed(options: TrainOptions, over: Mapping[str, Any], where: str) -> TrainOptions:
    """Training options with what a section says over them.

    Raises:
        UserError: naming the section and what is wrong in it.
    """
    return from_section(TrainOptions, asdict(options) | dict(over), where)


def check_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """
    Raises:
        UserError: unless they are different integers, one at least.
    """
    whole = all(type(seed) is int for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: expected different integers, got {list(seeds)}")
    return seeds


def settings_of(options: Any) -> dict[str, Any] | None:
    """A stage's options for its record: a checkpoint's distance changes no result."""
    if options is None:
        return None
    return {name: value for name, value in asdict(options).items() if name != "checkpoint_epochs"}


def _read(name: str, config: type[C], sections: Mapping[str, Any]) -> C:
    return from_section(config, sections.get(name), f"preset, [{name}]")
