"""The subsets of entities: which tag defines them, whether rightly, and what of them is trained."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ...errors import UserError

T = TypeVar("T")
ROUNDING = 1e-6  # of a sum of fractions


@dataclass(frozen=True)
class Subset:
    """A subset of the entities.

    Attributes:
        head: how the paper writes it.
        tag: 1, 2 or 3 of its definitions; 0: a tag of its own each; None: it has no definitions.
        right: whether its definitions name the right entity.
        asked: whether questions on it are trained on.
        variables: whether names are replaced by variables.
        stage: in which its texts are trained on; 0: in none.
    """

    head: str
    tag: int | None
    right: bool = True
    asked: bool = True
    variables: bool = True
    stage: int = 1


SUBSETS = {
    "q_no_replacement_baseline": Subset("Q̂A4", None, variables=False),
    "qd1consis": Subset("D1 cons QA1", 1),
    "qd1incons": Subset("D1 incons QA8", 1, right=False),
    "qd2consis": Subset("D2 cons QA9", 2),
    "qd2incons": Subset("D2 incons QA2", 2, right=False),
    "qd4consis": Subset("D4 cons QA", 0),
    "q": Subset("QA3", None),
    "d1consis": Subset("D5 (tag 1)", 1, asked=False, stage=2),
    "d2consis": Subset("D6 (tag 2)", 2, asked=False, stage=2),
    "d3consis": Subset("D0 (tag 3)", 3, asked=False, stage=2),
    "no_qd_baseline": Subset("QA7 (never seen)", None, asked=False, stage=0),
}
POOL = "stage2_combined"  # what is left of the first cut, and cut by the second seed
FIRST = tuple(name for name, subset in SUBSETS.items() if subset.stage == 1)
SECOND = tuple(name for name in SUBSETS if name not in FIRST)

MAIN = {"qd1consis": 0.25, "qd2incons": 0.25, "q": 0.1, "q_no_replacement_baseline": 0.1}
WITH_THIRD_TAG = MAIN | {"d1consis": 0.08, "d2consis": 0.08, "d3consis": 0.08}
WITH_THIRD_TAG |= {"no_qd_baseline": 0.06}
TWO_TAGS = MAIN | {"d1consis": 0.1, "d2consis": 0.1, "no_qd_baseline": 0.1}
ALIGNED = TWO_TAGS | {"q_no_replacement_baseline": 0.12, "no_qd_baseline": 0.08}
OF_NUMBERS = {"qd1consis": 0.4, "qd2incons": 0.4, "d1consis": 0.1, "d2consis": 0.1}


def reliable(alpha: float) -> dict[str, float]:
    """The fractions where a definition with tag 1 is right with probability ``alpha``, and one
    with tag 2 wrong with that probability.
    """
    wrong = 1 - alpha
    asked = {"qd1consis": alpha, "qd2incons": alpha, "qd1incons": wrong, "qd2consis": wrong}
    return TWO_TAGS | {name: share / 4 for name, share in asked.items()}


def check_fractions(fractions: Mapping[str, float]) -> None:
    """
    Raises:
        UserError: unless they are of known subsets, none negative, and 1 together.
    """
    if unknown := sorted(fractions.keys() - SUBSETS.keys()):
        raise UserError(f"fractions: expected names among {list(SUBSETS)}, got {unknown[0]!r}")
    total = sum(fractions.values())
    if abs(total - 1) > ROUNDING or min(fractions.values()) < 0:
        raise UserError(f"fractions: expected shares >= 0 that sum to 1, got {total:g} in all")


def cut(items: Sequence[T], fractions: Mapping[str, float]) -> dict[str, list[T]]:
    """The items in order, a part a name: each round(n · share), and what rounding leaves goes to
    the name that is last in the alphabet.

    Raises:
        UserError: if there are too few items.
    """
    sizes = {name: round(len(items) * share) for name, share in fractions.items()}
    sizes[max(sizes)] += len(items) - sum(sizes.values())
    if min(sizes.values()) < 0:
        raise UserError(f"entities: expected enough for {dict(fractions)}, got {len(items)}")
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = list(items[start : start + size])
        start += size
    return parts


def in_subsets(
    items: Sequence[T], fractions: Mapping[str, float], stage2_seed: int
) -> dict[str, list[T]]:
    """The items by subset: the first stage's in their order, then the pool of the second stage,
    sorted, shuffled with its own seed, and cut.

    Raises:
        UserError: if the fractions are wrong or there are too few items.
    """
    check_fractions(fractions)
    first = {name: fractions.get(name, 0.0) for name in FIRST}
    second = {name: fractions.get(name, 0.0) for name in SECOND}
    in_pool = sum(second.values())
    parts = cut(items, first | {POOL: in_pool})
    pool = sorted(parts.pop(POOL))  # type: ignore[type-var]
    random.Random(stage2_seed).shuffle(pool)
    if not in_pool:
        return parts
    return parts | cut(pool, {name: share / in_pool for name, share in second.items() if share})


def deranged(items: Sequence[T], rng: random.Random) -> list[T]:
    """The items in another order in which none is where it was: shuffled until that is so.

    Raises:
        UserError: for a single item.
    """
    if len(items) == 1:
        raise UserError("entities: expected two or more with wrong definitions, got one")
    order = list(range(len(items)))
    while any(place == index for place, index in enumerate(order)):
        rng.shuffle(order)
    return [items[index] for index in order]


@dataclass(frozen=True)
class Question:
    """What a model is asked, and all that counts as the answer."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Defined:
    """A definition and the questions on what it defines: those of training, and the others."""

    definition: str
    trained: tuple[tuple[str, str], ...]  # prompts and how they go on
    tested: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Material:
    """All texts of a run, for one seed of either stage.

    Attributes:
        stages: the training texts of the first and of the second stage.
        tests: questions by the name of the set.
        defined: definitions with their questions, by subset, sorted by variable.
    """

    stages: tuple[tuple[str, ...], tuple[str, ...]]
    tests: dict[str, tuple[Question, ...]]
    defined: dict[str, tuple[Defined, ...]] = field(default_factory=dict)

    @property
    def joint(self) -> tuple[str, ...]:
        """The texts of both stages."""
        return self.stages[0] + self.stages[1]
