"""Entities to texts: variables in the place of names, tags, definitions, questions.

Every draw of a seed is made here, in one order.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import UserError
from .people import Entity
from .subsets import SUBSETS, Defined, Material, Question, Subset, deranged, in_subsets

VARIABLE_LETTERS, TAG_LETTERS = 5, 6
ORDERS = ("tve", "tev", "vte", "vet", "etv", "evt")  # of tag, variable and entity
ATTRIBUTION = {
    "who": "Who is {}?",
    "mean": "What does {} mean?",
    "stand": "What does {} stand for?",
    "name": "What is the name of {}?",
}
SWAPPED = "_swapped"  # the right answer is the entity that the wrong definition names


@dataclass(frozen=True)
class TextRules:
    """How entities become texts.

    Attributes:
        fractions: of the subsets.
        order: of tag, variable and entity in a definition.
        held_out: the share of an entity's questions that is for tests only.
    """

    fractions: Mapping[str, float]
    order: str = "tve"
    held_out: float = 1 / 6

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UserError(f"order: expected one of {ORDERS}, got {self.order!r}")


@dataclass(frozen=True)
class _Member:
    """An entity of a subset: its variable, what its definition names, and its questions."""

    entity: Entity
    variable: str
    defined_as: str
    trained: tuple[tuple[str, str], ...]
    tested: tuple[tuple[str, str], ...]


def text_material(
    entities: Sequence[Entity], rules: TextRules, seed: int, stage2_seed: int
) -> Material:
    """The texts for a seed of either stage.

    The first seed draws, in this order: the order of the entities, the variables, their order, the
    tags, the wrong definitions, the questions that are held out, and the order of the texts. Both
    stages call it with the same one, and so have the same tags and variables.

    Raises:
        UserError: for wrong fractions, or too few entities for them.
    """
    rng = random.Random(seed)
    ordered = sorted(entities)
    rng.shuffle(ordered)
    variables = random_names(len(ordered), VARIABLE_LETTERS, rng)
    variable_of = dict(zip((each.name for each in ordered), variables, strict=True))
    parts = in_subsets(ordered, rules.fractions, stage2_seed)
    tags = random_names(3, TAG_LETTERS, rng)
    in_turn = sorted(parts, key=lambda subset: subset == "qd1incons")  # wrong ones: tag 2's first
    names = {subset: _defined_as(subset, parts[subset], rng) for subset in in_turn}
    subsets = {
        subset: [
            _member(entity, variable_of[entity.name], said, SUBSETS[subset], rules, rng)
            for entity, said in zip(members, names[subset], strict=True)
        ]
        for subset, members in parts.items()
    }
    defined = {
        subset: tuple(
            Defined(_definition(each, subset, tags, rules.order, rng), each.trained, each.tested)
            for each in sorted(members, key=lambda member: member.variable)
        )
        for subset, members in subsets.items()
        if SUBSETS[subset].tag is not None
    }
    stages = _texts(subsets, defined, rng)
    return Material(stages, _tests(subsets), defined)


def random_names(count: int, letters: int, rng: random.Random) -> list[str]:
    """Different strings of random letters in brackets, in random order."""
    found: set[str] = set()
    while len(found) < count:
        found.add("<|" + "".join(rng.choices(string.ascii_lowercase, k=letters)) + "|>")
    names = sorted(found)
    rng.shuffle(names)
    return names


def _defined_as(subset: str, members: Sequence[Entity], rng: random.Random) -> list[str]:
    """What the definitions of a subset name: the entity, or if wrong another of the subset."""
    names = [each.name for each in members]
    return names if SUBSETS[subset].right or not names else deranged(names, rng)


def _member(
    entity: Entity, variable: str, said: str, its: Subset, rules: TextRules, rng: random.Random
) -> _Member:
    shown = variable if its.variables else entity.name
    questions = [
        (f"Q: {question.replace(entity.name, shown)}\nA:", f" {answer.split(';')[0].strip()}\n")
        for question, answer in entity.questions
    ]
    count = max(1, round(len(questions) * rules.held_out)) if its.asked else len(questions)
    held_out = set(rng.sample(range(len(questions)), count))
    trained = tuple(pair for index, pair in enumerate(questions) if index not in held_out)
    tested = tuple(pair for index, pair in enumerate(questions) if index in held_out)
    return _Member(entity, variable, said, trained, tested)


def _definition(
    member: _Member, subset: str, tags: Sequence[str], order: str, rng: random.Random
) -> str:
    number = SUBSETS[subset].tag
    assert number is not None
    tag = tags[number - 1] if number else random_names(1, TAG_LETTERS, rng)[0]
    words = {"t": tag, "v": member.variable, "e": member.defined_as}
    return " ".join(words[each] for each in order) + "\n"


def _texts(
    subsets: Mapping[str, Sequence[_Member]],
    defined: Mapping[str, Sequence[Defined]],
    rng: random.Random,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    texts: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for subset, members in subsets.items():
        stage = texts[SUBSETS[subset].stage]
        stage += [prompt + answer for each in members for prompt, answer in each.trained]
        stage += [each.definition for each in defined.get(subset, ())]
    for each in (texts[1], texts[2]):
        each.sort()
        rng.shuffle(each)
    return tuple(texts[1]), tuple(texts[2])


def _tests(subsets: Mapping[str, Sequence[_Member]]) -> dict[str, tuple[Question, ...]]:
    """Questions by test set: on facts, and, as ``SUBSET:WORD``, on the entity itself."""
    tests = {}
    for subset, members in subsets.items():
        pairs = [pair for each in members for pair in each.tested]
        tests[subset] = tuple(Question(prompt, (answer.strip(),)) for prompt, answer in pairs)
        if subset in ("q_no_replacement_baseline", "no_qd_baseline"):
            continue
        for word, template in ATTRIBUTION.items():
            tests[f"{subset}:{word}"] = _attribution(template, members, swapped=False)
            if not SUBSETS[subset].right:
                name = f"{subset}{SWAPPED}:{word}"
                tests[name] = _attribution(template, members, swapped=True)
    if "d2consis" in subsets:
        tests["d2incons"] = _swapped_in_pairs(subsets["d2consis"])
    return tests


def _attribution(template: str, members: Sequence[_Member], swapped: bool) -> tuple[Question, ...]:
    return tuple(
        Question(
            f"Q: {template.format(each.variable)}\nA:",
            (each.defined_as if swapped else each.entity.name,),
        )
        for each in members
    )


def _swapped_in_pairs(members: Sequence[_Member]) -> tuple[Question, ...]:
    """The questions of a subset with the variables of neighbours, by variable, exchanged."""
    ordered = sorted(members, key=lambda each: each.variable)
    questions = []
    for one, other in zip(ordered[::2], ordered[1::2], strict=False):
        for asked, shown in ((one, other), (other, one)):
            questions += [
                Question(prompt.replace(asked.variable, shown.variable), (answer.strip(),))
                for prompt, answer in asked.tested
            ]
    return tuple(questions)
