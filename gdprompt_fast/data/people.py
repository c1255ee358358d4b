"""Passages of four facts about four invented people with questions on them; articles of facts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from datasets import Dataset
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from .triples import TrainTest
from .words import word_tokenizer

FACTS_PER_PASSAGE = 4
TEST_ONE_IN = 10  # every tenth person and every tenth thing is kept for the test set

# A fact names the relation by a noun ("the buyer of the red mill is …"), its question by a verb.
QUESTIONS = {
    "builder": "who constructed {}?",
    "buyer": "who paid for {}?",
    "cleaner": "who washes {}?",
    "designer": "who drew {}?",
    "finder": "who discovered {}?",
    "founder": "who started {}?",
    "guard": "who protects {}?",
    "guest": "who stays at {}?",
    "heir": "who inherits {}?",
    "keeper": "who looks after {}?",
    "owner": "who has {}?",
    "seller": "who parted with {}?",
}
COLOURS = "amber black blue brown green grey ivory pink purple red silver white"
PLACES = (
    "barn bridge castle chapel farm garden harbour house inn library "
    "lodge market mill museum palace school stable station theatre tower"
)
FIRST_NAMES = (
    "Ada Agnes Alma Anton Arno Astrid Bela Birgit Bruno Carla Casper Clara Cleo Cosmo Dagmar "
    "Dario Delia Dora Edda Egon Elsa Emil Enzo Esther Falk Felix Flora Frida Gita Greta Gustav "
    "Hanna Hedda Hugo Ida Ines Irma Ivan Jarl Jonas Julia Kira Klaus Lars Lena Levi Lotte Ludwig "
    "Magda Mara Marek Milo Mona Nadia Nils Nora Olga Oscar Otto Pavel Petra Quinn Ralf Rita Rosa "
    "Rufus Selma Sven Tilda Tova Ugo Ulla Vera Viktor Wanda Willem Xenia Yara Yuri Zeno"
)
LAST_NAMES = (
    "Abel Acker Adler Amsel Arendt Barth Becker Berger Bloch Brandt Busch Castell Conrad Corvin "
    "Dahl Decker Dorn Drexel Ebner Ekberg Elster Engel Faber Fischer Fonti Forster Frey Geiger "
    "Grau Gruber Haas Hartmann Holm Horvath Huber Imhof Jansen Juhl Kaiser Keller Kessler Koch "
    "Kramer Lang Lindner Lorenz Lund Maurer Mertens Moser Nagel Novak Olsen Orlov Peters Pohl "
    "Prell Quist Rask Ravn Richter Sauer Schulz Seidel Sommer Stern Strand Thule Torres Ulrich "
    "Vidal Vogel Voss Wagner Weber Winter Xander Ymer Zeller Zorn"
)


Item = TypeVar("Item")
Facts = list[tuple[str, str, str]]  # (noun, thing, name), as in "the buyer of the mill is Ada."


def make_people_data(train_size: int, test_size: int, seed: int) -> TrainTest:
    """Seeded triples: a passage of four facts, a question about one in other words, the answer.

    To train on, every passage is there four times in a row, with a question on each of its facts;
    to test on, once, so that the scores of two triples are independent.

    A person (first and last name) and a thing (colour and place) belong to the training or to the
    test set, never to both. The single words are shared, so that no test word is untrained.
    """
    train, test = _worlds()
    return TrainTest(
        Dataset.from_list(_triples(train, train_size, f"{seed} train", FACTS_PER_PASSAGE)),
        Dataset.from_list(_triples(test, test_size, f"{seed} test", 1)),
        {"train": train_size, "test": test_size},
    )


def make_people_articles(train_size: int, test_size: int, seed: int) -> tuple[list[str], list[str]]:
    """Seeded texts to train and to test on, whose second half follows from their first.

    Four facts by the noun ("the builder of the red mill is Ada Holm."), then the same four by the
    verb and in another order ("Ada Holm constructed the red mill."). People and things are
    divided as in :func:`make_people_data`.
    """
    train, test = _worlds()
    return (
        _articles(train, train_size, f"{seed} train articles"),
        _articles(test, test_size, f"{seed} test articles"),
    )


def people_dialogue(rng: random.Random, facts: int) -> list[tuple[str, str]]:
    """A passage about the training people, then all its questions in another order, in turns: what
    is read, and the answer to it.
    """
    drawn = _worlds()[0].draw_facts(rng, facts)
    turns = [(_question(noun, thing), name) for noun, thing, name in rng.sample(drawn, facts)]
    (question, name), *rest = turns
    return [(f"{_passage(drawn)} {question}", name), *rest]


@dataclass(frozen=True)
class _World:
    """The people and the things that texts are about."""

    names: list[str]
    things: list[str]

    def draw_facts(self, rng: random.Random, count: int) -> Facts:
        nouns = rng.sample(sorted(QUESTIONS), count)
        things = rng.sample(self.things, count)
        names = rng.sample(self.names, count)
        return list(zip(nouns, things, names, strict=True))


@cache
def _worlds() -> tuple[_World, _World]:
    """Two worlds that have no person and no thing in common: to train and to test on.

    The same for every seed: who is unseen in one run was not seen by a model of another.
    """
    train_names, test_names = apart(shuffled_pairs(FIRST_NAMES, LAST_NAMES))
    train_things, test_things = apart(shuffled_pairs(COLOURS, PLACES))
    return _World(train_names, train_things), _World(test_names, test_things)


def apart(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """What is trained on and, one item in ``TEST_ONE_IN``, what is tested on."""
    test = len(items) // TEST_ONE_IN
    return list(items[test:]), list(items[:test])


def shuffled_pairs(first_words: str, second_words: str) -> list[str]:
    """Every "first second" of two lists of words, in an order that is always the same."""
    pairs = [
        f"{first} {second}" for first in first_words.split() for second in second_words.split()
    ]
    random.Random(0).shuffle(pairs)
    return pairs


def _triples(world: _World, size: int, seed: str, questions: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    triples: list[dict[str, str]] = []
    while len(triples) < size:
        facts = world.draw_facts(rng, FACTS_PER_PASSAGE)
        for noun, thing, name in rng.sample(facts, questions):
            question = _question(noun, thing)
            triples.append({"context": _passage(facts), "query": question, "response": name})
    return triples[:size]


def _question(noun: str, thing: str) -> str:
    return QUESTIONS[noun].format(f"the {thing}")


def _passage(facts: Facts) -> str:
    return " ".join(f"the {noun} of the {thing} is {name}." for noun, thing, name in facts)


def _articles(world: _World, size: int, seed: str) -> list[str]:
    rng = random.Random(seed)
    return [_article(rng, world) for _ in range(size)]


def _article(rng: random.Random, world: _World) -> str:
    facts = world.draw_facts(rng, FACTS_PER_PASSAGE)
    again = [_statement(*fact) for fact in rng.sample(facts, len(facts))]
    return " ".join([_passage(facts), *again])


def _statement(noun: str, thing: str, name: str) -> str:
    """The question's own words with the name for "who": "Ada Holm constructed the red mill."."""
    return _question(noun, thing).replace("who", name, 1).replace("?", ".")


def people_vocabulary() -> list[str]:
    """Every word and mark that a triple or an article can contain, sorted."""
    questions = [question.format("the") for question in QUESTIONS.values()]
    words = ["of is .", *QUESTIONS, *questions, COLOURS, PLACES, FIRST_NAMES, LAST_NAMES]
    return sorted({word for word, _ in Whitespace().pre_tokenize_str(" ".join(words))})


def people_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the generator's own words."""
    return word_tokenizer(people_vocabulary())
