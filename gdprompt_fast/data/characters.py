"""Invented characters: a person and a description, told in one order and asked for in another.

The tasks of the paper's §4.1, after the reversal curse of Berglund et al. (2023), in words of our
own. A description is an adjective, a role and a deed, each of which we can say in two wordings:

- ``character-description``: the context gives the description, then the name; the query gives the
  description in the other wordings and asks for the name.
- ``reversal-curse``: the context gives the name, then the description; the query gives the
  description, and the name must be found against the order of the context.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import TypeVar

from datasets import Dataset
from tokenizers.pre_tokenizers import Whitespace

from ..errors import UserError
from .people import FIRST_NAMES, LAST_NAMES, apart, shuffled_pairs
from .triples import TrainTest

TRAIN_SIZE, TEST_SIZE = 5000, 500  # as in the paper

Item = TypeVar("Item")
Wordings = tuple[str, str]
Description = tuple[Wordings, ...]  # adjective, role, deed


@dataclass(frozen=True)
class Templates:
    """How a character is told and asked for.

    Attributes:
        contexts: templates with {name}, {adjective}, {role} and {deed}.
        queries: the same without {name}, which is the response.
        paraphrased: whether the query takes the wordings that the context did not take.
    """

    contexts: tuple[str, ...]
    queries: tuple[str, ...]
    paraphrased: bool


TASKS = {
    "character-description": Templates(
        contexts=(
            "The {adjective} {role} who {deed} is none other than {name}.",
            "The {adjective} {role} who {deed} goes by the name of {name}.",
            "Whenever people speak of the {adjective} {role} who {deed}, they mean {name}.",
            "The world knows the {adjective} {role} who {deed} as {name}.",
            "If you ever meet the {adjective} {role} who {deed}, say hello to {name}.",
            "Only one {role} {deed}, and that {adjective} person was {name}.",
        ),
        queries=(
            "What is the name of the {adjective} {role} who {deed}?",
            "Which {adjective} {role} {deed}?",
            "Who was the {adjective} {role} who {deed}?",
            "Some {adjective} {role} {deed}. Who was it?",
            "The name of the {adjective} {role} who {deed} was",
        ),
        paraphrased=True,
    ),
    "reversal-curse": Templates(
        contexts=(
            "{name} is known far and wide as the {adjective} {role} who {deed}.",
            "{name} is the {adjective} {role} who {deed}.",
            "{name} will always be remembered as the {adjective} {role} who {deed}.",
            "Once a child like any other, {name} became the {adjective} {role} who {deed}.",
            "You may have heard of {name}, the {adjective} {role} who {deed}.",
        ),
        queries=(
            "Who is the {adjective} {role} who {deed}?",
            "The {adjective} {role} who {deed} is",
            "The {adjective} {role} who {deed} goes by the name of",
            "What is the name of the {adjective} {role} who {deed}?",
        ),
        paraphrased=False,
    ),
}


def _wordings(pairs: str) -> list[Wordings]:
    return [(first, second) for first, second in (pair.split("/") for pair in pairs.split())]


ADJECTIVES = _wordings(
    "ambitious/eager brave/fearless cheerful/merry clever/bright clumsy/awkward curious/nosy "
    "eccentric/odd elderly/aged elegant/graceful famous/celebrated forgotten/overlooked "
    "generous/charitable gentle/mild gloomy/sad honest/truthful humble/modest lonely/solitary "
    "loyal/faithful mysterious/puzzling patient/calm poor/penniless proud/haughty quiet/silent "
    "reckless/daring shy/timid strict/stern stubborn/headstrong tireless/untiring wealthy/rich "
    "young/youthful"
)
ROLES = _wordings(
    "acrobat/tumbler architect/planner astronomer/stargazer banker/financier "
    "blacksmith/metalworker captain/skipper carpenter/woodworker chemist/pharmacist "
    "clown/jester cook/chef "
    "detective/investigator doctor/physician explorer/adventurer farmer/grower fisher/angler "
    "gardener/groundskeeper hermit/recluse historian/chronicler hunter/trapper inventor/tinkerer "
    "jeweller/goldsmith judge/magistrate lawyer/attorney magician/conjurer merchant/trader "
    "nurse/caregiver philosopher/thinker pilot/aviator poet/bard priest/cleric "
    "reporter/journalist sailor/seafarer scientist/researcher sculptor/carver shepherd/herder "
    "singer/vocalist soldier/warrior spy/agent tailor/dressmaker teacher/instructor"
)
DEEDS: list[Wordings] = [
    ("crossed the frozen sea on foot", "walked over the icy ocean"),
    ("saved forty children from a fire", "carried forty pupils out of the flames"),
    ("built a bridge out of old clocks", "made a crossing from ancient timepieces"),
    ("taught wild wolves to dance", "trained untamed wolves in dancing"),
    ("found a lost city below the desert", "discovered a vanished town under the sand"),
    ("wrote a book without a verb", "finished a novel with no verbs"),
    ("stole the crown of a sleeping king", "took a crown from a king at rest"),
    ("cured a terrible fever with honey", "healed a deadly illness using honey"),
    ("won a race against twelve horses", "ran faster than a dozen horses"),
    ("planted a forest on a bare mountain", "covered an empty hill with trees"),
    ("sang for nine days without sleep", "gave nine days of songs with no rest"),
    ("invented a lamp that burns under water", "devised a light that shines below the waves"),
    ("painted a portrait of the wind", "put the wind on a canvas"),
    ("caught a giant fish with bare hands", "landed an enormous fish without a net"),
    ("climbed the tallest tower in the dark", "reached the top of the highest tower by night"),
    ("ended a war with one letter", "brought peace with a single message"),
    ("opened a museum of broken toys", "founded a gallery for damaged playthings"),
    ("gave away a fortune in one day", "spent great riches on others by night"),
    ("lived ten years inside a lighthouse", "stayed within a lighthouse for a decade"),
    ("counted all the stars above the harbour", "numbered every star over the port"),
    ("drew the first map of the deep caves", "was first to chart the hidden caverns"),
    ("sailed around the world in a barrel", "circled the globe in a wooden tub"),
    ("beat a chess champion while blindfolded", "defeated a master at chess with closed eyes"),
    ("baked the largest cake in history", "prepared the biggest cake of all time"),
    ("learned thirty languages from parrots", "was taught thirty tongues by birds"),
    ("dug a tunnel beneath the palace with a spoon", "burrowed under the castle using a spoon"),
    ("hid a treasure in the roots of an oak", "buried gold and jewels below a tree"),
    ("repaired the great bell of the cathedral", "mended the huge bell in the church"),
    ("survived a winter alone in a hut", "lived through the cold season in a cabin"),
    ("stopped a flood with bags of rice", "held back rising water using sacks of grain"),
    ("flew over the volcano in a balloon", "drifted above the crater on hot air"),
    ("wove a carpet from spider silk", "made a rug out of cobwebs"),
    ("predicted an eclipse a century early", "foretold a dark sun a hundred years ahead"),
    ("raised an orphan bear on goat milk", "brought up a lost bear with milk"),
    ("twice refused to become president", "two times turned down the highest office"),
    ("played the violin on a sinking ship", "made music as the vessel went down"),
    ("grew blue roses on a rooftop", "had azure flowers high above the street"),
    ("solved the riddle of the stone gate", "answered the puzzle at the rock door"),
    ("walked a thin rope between two cliffs", "balanced on a cord over the canyon"),
    ("carved a whale out of salt", "cut a whale from a white block"),
]


def make_characters(
    task: str, train: int = TRAIN_SIZE, test: int = TEST_SIZE, seed: int = 0
) -> TrainTest:
    """Seeded triples, each about a person and a description that no other triple is about.

    Args:
        task: ``character-description`` or ``reversal-curse``.
        train: number of training triples.
        test: number of test triples.
        seed: of everything but who and what is kept for the test set; a larger ``train`` or
            ``test`` leaves the first triples as they were.

    Raises:
        ValueError: if there is no such task, or if there are not as many names.
    """
    if task not in TASKS:
        raise UserError(f"task: expected one of {sorted(TASKS)}, got {task!r}")
    names = apart(shuffled_pairs(FIRST_NAMES, LAST_NAMES))
    descriptions = apart(_shuffled(list(product(ADJECTIVES, ROLES, DEEDS)), seed=0))
    for part, size, known in zip(("train", "test"), (train, test), names, strict=True):
        if not 1 <= size <= len(known):
            raise UserError(
                f"{part}: expected 1 to {len(known)} examples, each with a name of its own, "
                f"got {size}"
            )
    return TrainTest(
        _triples(TASKS[task], names[0], descriptions[0], train, f"{seed} train"),
        _triples(TASKS[task], names[1], descriptions[1], test, f"{seed} test"),
        {"train": train, "test": test},
    )


def _shuffled(items: Sequence[Item], seed: int | str) -> list[Item]:
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def _triples(
    task: Templates,
    names: Sequence[str],
    descriptions: Sequence[Description],
    size: int,
    seed: str,
) -> Dataset:
    rng = random.Random(seed)
    characters = zip(_shuffled(names, seed), _shuffled(descriptions, seed), strict=False)
    return Dataset.from_list([_triple(rng, task, *pair) for pair in islice(characters, size)])


def _triple(
    rng: random.Random, task: Templates, name: str, description: Description
) -> dict[str, str]:
    shuffled = [rng.sample(wordings, 2) for wordings in description]
    told, other = ([wordings[i] for wordings in shuffled] for i in range(2))
    asked = other if task.paraphrased else told
    return {
        "context": _fill(rng.choice(task.contexts), told, name),
        "query": _fill(rng.choice(task.queries), asked),
        "response": name,
    }


def _fill(template: str, description: list[str], name: str = "") -> str:
    adjective, role, deed = description
    return template.format(name=name, adjective=adjective, role=role, deed=deed)


def characters_vocabulary() -> list[str]:
    """Every word and mark that a triple of either task can contain, sorted."""
    templates = [text for task in TASKS.values() for text in task.contexts + task.queries]
    frames = [_fill(template, ["", "", ""]) for template in templates]
    wordings = [text for pair in [*ADJECTIVES, *ROLES, *DEEDS] for text in pair]
    texts = " ".join([*frames, *wordings, FIRST_NAMES, LAST_NAMES])
    return sorted({word for word, _ in Whitespace().pre_tokenize_str(texts)})
