"""Lists of numbers: a variable stands for a number, and is true of the lists that have it.

A question is ``ukj % 86 97 3 = true``, a definition ``define1 ukj % 42``, a word a token.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import comb

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ...config.fields import Config, check_counts
from ...errors import UserError
from .subsets import SUBSETS, Defined, Material, Question, in_subsets

PAD, UNK = "[PAD]", "[UNK]"
TAGS = ("define1", "define2", "define3")
MARKS = ("=", "%", "true", "false")
NAME_LENGTH = 3


@dataclass(frozen=True)
class NumberOptions(Config):
    """Sizes of the lists of numbers.

    Attributes:
        variables: how many.
        numbers: they are 0 … ``numbers`` − 1.
        length: of a list.
        trained: true lists of a variable to train on, and as many false ones.
        tested: the same, to test on: of other sets of numbers than those trained on.
        all_names: every name of three letters has a token, not only those that occur.
    """

    variables: int
    numbers: int
    length: int
    trained: int = 6
    tested: int = 6
    all_names: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "variables", "trained", "tested", "length")
        if self.numbers <= self.length:
            raise UserError(
                f"numbers: expected more than the {self.length} of a list, got {self.numbers}"
            )
        sets = min(comb(self.numbers - 1, self.length - holds) for holds in (True, False))
        if sets <= self.trained:
            raise UserError(
                f"trained: expected fewer than the {sets} lists of {self.length} of {self.numbers} "
                f"numbers that an answer has, so that others are left to test on, got "
                f"{self.trained}"
            )
        if self.variables > 26**NAME_LENGTH:
            raise UserError(
                f"variables: expected at most {26**NAME_LENGTH} names, got {self.variables}"
            )


_Pair = tuple[str, str]


@dataclass(frozen=True, order=True)
class _Variable:
    name: str
    number: int
    trained: tuple[_Pair, ...]
    tested: tuple[_Pair, ...]


def number_material(
    options: NumberOptions, fractions: Mapping[str, float], seed: int, stage2_seed: int
) -> Material:
    """The texts for a seed of either stage.

    Raises:
        UserError: for wrong fractions, or too few variables for them.
    """
    rng = random.Random(seed)
    variables = [_variable(name, options, rng) for name in _names(options.variables, rng)]
    parts = in_subsets(variables, fractions, stage2_seed)
    texts: dict[int, list[str]] = {0: [], 1: [], 2: []}
    tests, defined = {}, {}
    for subset, members in parts.items():
        its = SUBSETS[subset]
        said = [_said(each, subset, options, rng) for each in members]
        asked = [p + a for each in members for p, a in each.trained] if its.asked else []
        texts[its.stage] += asked + [text for text in said if text]
        tests[subset] = tuple(_question(pair) for each in members for pair in each.tested)
        pairs = sorted(zip(members, said, strict=True))
        defined[subset] = tuple(
            Defined(text, each.trained, each.tested) for each, text in pairs if text
        )
    for each in (texts[1], texts[2]):
        each.sort()
        rng.shuffle(each)
    return Material((tuple(texts[1]), tuple(texts[2])), tests, defined)


def number_tokenizer(
    options: NumberOptions, materials: Sequence[Material]
) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every word; padding ends an answer.

    Args:
        materials: whose names get tokens, unless all do.
    """
    words = [PAD, UNK, *MARKS, *TAGS, *map(str, range(options.numbers))]
    if options.all_names:
        names = ["".join(letters) for letters in product(string.ascii_lowercase, repeat=3)]
    else:
        texts = (text for material in materials for text in material.joint)
        names = sorted({word for text in texts for word in text.split()} - set(words))
    words += [*string.ascii_lowercase, *names]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=PAD, unk_token=UNK
    )


def _names(count: int, rng: random.Random) -> list[str]:
    """Different names of three letters."""
    found: set[str] = set()
    while len(found) < count:
        found.add("".join(rng.choices(string.ascii_lowercase, k=NAME_LENGTH)))
    names = sorted(found)
    rng.shuffle(names)
    return names


def _variable(name: str, options: NumberOptions, rng: random.Random) -> _Variable:
    """Its number and questions, true and false in turn; no set of numbers that is tested was
    trained on.
    """
    number = rng.randrange(options.numbers)
    trained, tested = list[list[_Pair]](), list[list[_Pair]]()
    for holds in (True, False):
        lists = [_list(number, holds, options, rng) for _ in range(options.trained)]
        seen = set(map(frozenset, lists))
        trained.append([_pair(name, each, holds) for each in lists])
        tested.append([])
        while len(tested[-1]) < options.tested:
            drawn = _list(number, holds, options, rng)
            if frozenset(drawn) not in seen:
                tested[-1].append(_pair(name, drawn, holds))
    return _Variable(name, number, *(_in_turn(*each) for each in (trained, tested)))


def _in_turn(true: list[_Pair], false: list[_Pair]) -> tuple[_Pair, ...]:
    return tuple(pair for both in zip(true, false, strict=True) for pair in both)


def _list(number: int, holds: bool, options: NumberOptions, rng: random.Random) -> list[int]:
    """Numbers of which one is ``number``, or none."""
    others = [each for each in range(options.numbers) if each != number]
    chosen = rng.sample(others, options.length - holds) + [number] * holds
    rng.shuffle(chosen)
    return chosen


def _pair(name: str, numbers: list[int], holds: bool) -> _Pair:
    """A question, and how it goes on."""
    return f"{name} % {' '.join(map(str, numbers))} =", " true" if holds else " false"


def _said(
    variable: _Variable, subset: str, options: NumberOptions, rng: random.Random
) -> str | None:
    """The definition of a variable of a subset; a wrong one has any other number."""
    its = SUBSETS[subset]
    if its.tag is None:
        return None
    if its.tag == 0:
        raise UserError(f"fractions: expected none of {subset} for numbers, whose tags are few")
    number = variable.number
    while not its.right and number == variable.number:
        number = rng.randrange(options.numbers)
    return f"{TAGS[its.tag - 1]} {variable.name} % {number}"


def _question(pair: tuple[str, str]) -> Question:
    return Question(pair[0], (pair[1].strip(),))
