from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from ..artifacts.files import hash_of_file
from ..errors import UserError
from ..loading import find_model, fingerprint_of, load_model
from .context import Context
from .material.numbers import number_material
from .material.people import read_people
from .material.subsets import Material
from .material.texts import TextRules, text_material
from .material.triples import read_triples
from .preset import NUMBERS, PEOPLE, SOURCES, TRIPLES, AskOptions, Preset, changed
from .scratch import NumberLists, new_model
from .stages import MaterialOf, NewModel
from .train import TrainOptions

WITHOUT_VARIABLES = "q_no_replacement_baseline"
Training = Callable[[str, dict[str, Any]], TrainOptions]


@dataclass(frozen=True)
class Source:
    """Models and texts.

    Attributes:
        new_model: the model at the beginning, and its tokenizer.
        material: the texts, by the seed of the second stage.
        training: of ``"first"``, ``"second"`` or ``"joint"``, with what is said over it.
        ask: how it is asked.
        settings: what all of it follows from.
    """

    new_model: NewModel
    material: MaterialOf
    training: Training
    ask: AskOptions
    settings: dict[str, Any]


def source_of(
    ctx: Context,
    source: str,
    rules: TextRules,
    lists: str,
    entities: int | None = None,
    model: str | None = None,
) -> Source:
    """The source of a name.

    Args:
        rules: of texts; of numbers their fractions count.
        lists: the preset's section with the sizes of numbers.
        entities: how many, in the place of the table's.
        model: the pretrained one, in the place of the preset's.

    Raises:
        UserError: if a section of the preset that it takes is not there, or wrong.
    """
    if source == NUMBERS:
        return _numbers(ctx, rules, lists, entities)
    return _entities(ctx, source, rules, entities, model or ctx.preset.model.name)


class HasSource(Protocol):
    """Options of an experiment that name a source of texts."""

    @property
    def source(self) -> str:
        """As :func:`source_of` takes it."""

    @property
    def lists(self) -> str:
        """The section with the sizes of numbers."""


def check_source(preset: Preset, source: str, lists: str, *stages: str) -> None:
    """
    Args:
        stages: of training, that have to be said.

    Raises:
        UserError: if there is no such source, or a section that it takes is not there.
    """
    if source not in SOURCES:
        raise UserError(f"source: expected one of {SOURCES}, got {source!r}")
    if source == NUMBERS:
        options = preset.section(lists, NumberLists)
        _ = options.numbers, options.size, options.staged
        return
    preset.table(source).path(source)
    for stage in stages:
        preset.training(stage)


def check_two_stages(preset: Preset, options: HasSource) -> None:
    """What experiments of two stages ask of a preset.

    Raises:
        UserError: if the source is not there, or a stage of training is not said.
    """
    check_source(preset, options.source, options.lists, "first", "second")


def _entities(
    ctx: Context, source: str, rules: TextRules, entities: int | None, name: str
) -> Source:
    preset, general, table = ctx.preset, ctx.preset.model, ctx.preset.table(source)
    path, count = table.path(source), entities or table.entities
    revision = general.revision if name == general.name else None
    read = {PEOPLE: read_people, TRIPLES: read_triples}[source](path, count, table.encoding)

    def material(stage2_seed: int) -> Material:
        return text_material(read, rules, ctx.seed, stage2_seed)

    def training(stage: str, over: dict[str, Any]) -> TrainOptions:
        return preset.training(stage, **over)

    load = partial(load_model, name, general.dtype, ctx.device, revision, ctx.allow_missing)
    settings = {
        "model": fingerprint_of(find_model(name, revision).folder),
        "source": source,
        "file": hash_of_file(path),
        "entities": count,
        "rules": asdict(rules),
    }
    return Source(load, material, training, preset.ask, settings)


def _numbers(ctx: Context, rules: TextRules, section: str, variables: int | None) -> Source:
    options = ctx.preset.section(section, NumberLists)
    size, fractions = options.size, dict(rules.fractions)
    if named := fractions.pop(WITHOUT_VARIABLES, 0.0):  # of numbers all have variables
        fractions["q"] = fractions.get("q", 0.0) + named
    numbers = options.numbers if variables is None else options.with_variables(variables)

    def material(stage2_seed: int) -> Material:
        return number_material(numbers, fractions, ctx.seed, stage2_seed)

    def model() -> Any:
        made, tokenizer = new_model(size, numbers, [material(0)], ctx.seed)
        return made.to(ctx.device), tokenizer

    def training(stage: str, over: dict[str, Any]) -> TrainOptions:
        own = options.staged.second if stage == "second" else options.staged.first
        assert own is not None
        return changed(own, over, f"preset, [{section}], {stage}")

    settings = {
        "source": NUMBERS,
        "lists": asdict(numbers),
        "model": asdict(size),
        "fractions": fractions,
    }
    ask = AskOptions(new_tokens=2, batch_size=512, questions=options.questions)
    return Source(model, material, training, ask, settings)
