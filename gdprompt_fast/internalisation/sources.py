"""Where an experiment that does not care begins: people and a pretrained model, or numbers and one
from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..artifacts.files import hash_of_file
from ..errors import UserError
from ..loading import load_model
from .context import Context, fingerprint_of
from .material.numbers import number_material
from .material.subsets import Material
from .material.texts import TextRules, text_material
from .number_lists import Options as NumberLists
from .number_lists import new_model
from .preset import AskOptions, Preset
from .stages import PEOPLE, NewModel, Staged, entities_of

NUMBERS = "numbers"
SOURCES = (PEOPLE, NUMBERS)


@dataclass(frozen=True)
class Source:
    """Models and texts.

    Attributes:
        name: in words.
        new_model: the model at the beginning, and its tokenizer.
        material: the texts, by the seed of the second stage.
        staged: the trainings of the preset.
        ask: how it is asked.
        settings: what all of it follows from.
    """

    name: str
    new_model: NewModel
    material: Any
    staged: Staged
    ask: AskOptions
    settings: dict[str, Any]


def source_of(
    ctx: Context,
    source: str,
    fractions: Mapping[str, float],
    entities: int | None = None,
    pretrained: str | None = None,
) -> Source:
    """The source of a name.

    Args:
        entities, pretrained: of people, in the place of the preset's.

    Raises:
        UserError: if a section of the preset that it takes is not there, or wrong.
    """
    if source == NUMBERS:
        return _numbers(ctx, fractions)
    return _people(ctx, fractions, entities, pretrained or ctx.preset.model.name)


def check_source(preset: Preset, source: str) -> None:
    """
    Raises:
        UserError: if there is no such source, or a section that it takes is not there.
    """
    if source not in SOURCES:
        raise UserError(f"source: expected one of {SOURCES}, got {source!r}")
    if source == PEOPLE:
        preset.table(PEOPLE).path(PEOPLE)
        preset.training("first"), preset.training("second")
    else:
        preset.section("number-lists", NumberLists)


def _people(
    ctx: Context, fractions: Mapping[str, float], entities: int | None, name: str
) -> Source:
    preset, general = ctx.preset, ctx.preset.model
    count = entities or preset.table(PEOPLE).entities
    revision = general.revision if name == general.name else None
    load = partial(load_model, name, general.dtype, ctx.device, revision)
    people = entities_of(ctx, PEOPLE, count)

    def material(stage2_seed: int) -> Material:
        return text_material(people, TextRules(fractions), ctx.seed, stage2_seed)

    settings = {
        "model": fingerprint_of(name, revision),
        "file": hash_of_file(preset.table(PEOPLE).path(PEOPLE)),
        "entities": count,
        "fractions": dict(fractions),
    }
    staged = Staged(preset.training("first"), preset.training("second"), 1)
    return Source(PEOPLE, partial(load, ctx.allow_missing), material, staged, preset.ask, settings)


def _numbers(ctx: Context, fractions: Mapping[str, float]) -> Source:
    options = ctx.preset.section("number-lists", NumberLists)
    numbers, size = options.numbers, options.size

    def material(stage2_seed: int) -> Material:
        return number_material(numbers, fractions, ctx.seed, stage2_seed)

    def model() -> Any:
        made, tokenizer = new_model(size, numbers, [material(0)], ctx.seed)
        return made.to(ctx.device), tokenizer

    settings = {"lists": asdict(numbers), "model": asdict(size), "fractions": dict(fractions)}
    ask = AskOptions(new_tokens=2, batch_size=512, questions=options.questions)
    return Source("lists of numbers", model, material, options.staged, ask, settings)
