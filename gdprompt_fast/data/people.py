"""The demo's data: passages of four facts about four invented people, and a question on one."""

from __future__ import annotations

import random
from dataclasses import dataclass

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

FACTS_PER_PASSAGE = 4
TEST_SHARE = 10  # every tenth person and every tenth thing is kept for the test set

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
    "Ada Arno Bela Birgit Cleo Cosmo Dario Delia Edda Emil Falk Flora Gita Hugo Ines Jarl "
    "Kira Levi Mara Nils Olga Pavel Quinn Rosa Sven Tova Ugo Vera Wanda Xenia Yara Zeno"
)
LAST_NAMES = (
    "Abel Acker Bloch Brandt Castell Corvin Dahl Dorn Ekberg Elster Fonti Frey Grau Holm Imhof "
    "Juhl Kessler Lund Moser Novak Orlov Prell Quist Ravn Stern Thule Ulrich Voss Winter Xander "
    "Ymer Zorn"
)
BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"


@dataclass(frozen=True)
class PeopleData:
    """Triples about two sets of people, and of things, that have nothing in common."""

    train: Dataset
    test: Dataset


def make_people_data(train_size: int, test_size: int, seed: int) -> PeopleData:
    """Seeded triples: a passage of four facts, a question about one in other words, the answer.

    A person (first and last name) and a thing (colour and place) belong to the training or to the
    test set, never to both. The single words are shared, so that no test word is untrained.
    """
    names = _shuffled_pairs(FIRST_NAMES, LAST_NAMES, seed)
    things = _shuffled_pairs(COLOURS, PLACES, seed)
    test_names, test_things = len(names) // TEST_SHARE, len(things) // TEST_SHARE
    train = _triples(names[test_names:], things[test_things:], train_size, f"{seed} train")
    test = _triples(names[:test_names], things[:test_things], test_size, f"{seed} test")
    return PeopleData(Dataset.from_list(train), Dataset.from_list(test))


def _shuffled_pairs(first_words: str, second_words: str, seed: int) -> list[str]:
    pairs = [
        f"{first} {second}" for first in first_words.split() for second in second_words.split()
    ]
    random.Random(seed).shuffle(pairs)
    return pairs


def _triples(names: list[str], things: list[str], size: int, seed: str) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [_triple(rng, names, things) for _ in range(size)]


def _triple(rng: random.Random, names: list[str], things: list[str]) -> dict[str, str]:
    facts = list(
        zip(
            rng.sample(sorted(QUESTIONS), FACTS_PER_PASSAGE),
            rng.sample(things, FACTS_PER_PASSAGE),
            rng.sample(names, FACTS_PER_PASSAGE),
            strict=True,
        )
    )
    noun, thing, name = rng.choice(facts)
    return {
        "context": " ".join(f"the {noun} of the {thing} is {name}." for noun, thing, name in facts),
        "query": QUESTIONS[noun].format(f"the {thing}"),
        "response": name,
    }


def people_vocabulary() -> list[str]:
    """Every word and mark that a triple can contain, sorted."""
    questions = [question.format("the") for question in QUESTIONS.values()]
    words = ["of is .", *QUESTIONS, *questions, COLOURS, PLACES, FIRST_NAMES, LAST_NAMES]
    return sorted({word for word, _ in Whitespace().pre_tokenize_str(" ".join(words))})


def people_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the generator's own words; it opens every text with ``<s>``."""
    words = [PAD, BOS, EOS, UNK, *people_vocabulary()]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK
    )
