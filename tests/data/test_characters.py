"""Generated characters and people: names, descriptions and wordings, each its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
from tokenizers.pre_tokenizers import Whitespace

from gdprompt_fast.data import (
    characters_vocabulary,
    make_characters,
    make_data,
    make_people_articles,
    people_vocabulary,
)
from gdprompt_fast.data.characters import ADJECTIVES, DEEDS, ROLES, Wordings
from gdprompt_fast.data.people import FIRST_NAMES, LAST_NAMES

TASKS = ("character-description", "reversal-curse")
GENERATED = (*TASKS, "people", "people-text")
NAMES = {*FIRST_NAMES.split(), *LAST_NAMES.split()}


def words_of(text: str) -> list[str]:
    return [word for word, _ in Whitespace().pre_tokenize_str(text)]


def said_in(text: str, part: list[Wordings]) -> list[tuple[int, int]]:
    """Which adjective, role or deed a text names, and in which wording."""
    spaced = f" {re.sub('[,.?]', ' ', text)} "
    return [
        (index, wording)
        for index, pair in enumerate(part)
        for wording, phrase in enumerate(pair)
        if f" {phrase} " in spaced
    ]


def description_of(text: str) -> tuple[tuple[int, int], ...]:
    """Adjective, role and deed of a text, each with its wording: exactly one of each."""
    ((deed, wording),) = said_in(text, DEEDS)
    (adjective,), (role,) = (
        said_in(text.replace(DEEDS[deed][wording], ""), part) for part in (ADJECTIVES, ROLES)
    )
    return adjective, role, (deed, wording)


def facts_of(records: Iterable[dict[str, Any]]) -> list[tuple[int, ...]]:
    """What the contexts describe, in whichever wording."""
    return [tuple(index for index, _ in description_of(record["context"])) for record in records]


@pytest.mark.parametrize("task", TASKS)
def test_no_two_characters_share_a_name_or_a_description(task: str) -> None:
    data = make_characters(task)
    records = data.train.to_list() + data.test.to_list()
    assert (len(data.train), len(data.test)) == (5000, 500)
    assert len({record["response"] for record in records}) == len(records)
    assert len({*facts_of(records)}) == len(records)


def test_every_wording_belongs_to_one_part_of_a_description() -> None:
    wordings = [phrase for part in (ADJECTIVES, ROLES, DEEDS) for pair in part for phrase in pair]
    assert len({*wordings}) == len(wordings)
    assert (len(ADJECTIVES), len(ROLES), len(DEEDS)) == (30, 40, 40)


def test_a_described_character_is_asked_for_in_other_words() -> None:
    for record in make_characters("character-description", 300, 30).train:
        told, asked = (description_of(record[field]) for field in ("context", "query"))
        for (fact, wording), (fact_asked, wording_asked) in zip(told, asked, strict=True):
            assert fact == fact_asked and wording != wording_asked
        assert record["context"].index(DEEDS[told[2][0]][told[2][1]]) < record["context"].index(
            record["response"]
        )
        assert record["response"] not in record["query"]


def test_the_reversal_curse_names_first_and_asks_from_the_description() -> None:
    for record in make_characters("reversal-curse", 300, 30).train:
        told, asked = (description_of(record[field]) for field in ("context", "query"))
        assert told == asked
        deed, wording = told[2]
        context = record["context"]
        assert context.index(record["response"]) < context.index(DEEDS[deed][wording])
        assert record["response"] not in record["query"]


def test_texts_are_sentences() -> None:
    for task in TASKS:
        for record in make_characters(task, 200, 20).train:
            assert record["context"][0].isupper() and record["context"].endswith(".")
            assert record["query"][0].isupper()
            assert re.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]+", record["response"])


@pytest.mark.parametrize("task", TASKS)
def test_characters_follow_from_the_seed(task: str) -> None:
    small, large = make_characters(task, 5, 3, seed=2), make_characters(task, 50, 3, seed=2)
    assert large.train.to_list()[:5] == small.train.to_list()
    assert large.test.to_list() == small.test.to_list()
    assert make_characters(task, 5, 3, seed=3).test.to_list() != small.test.to_list()


def test_characters_need_a_task_and_names() -> None:
    with pytest.raises(ValueError, match=r"task: expected one of \['character-description'"):
        make_characters("character")
    with pytest.raises(ValueError, match=r"test: expected 1 to 640 examples, .* got 700"):
        make_characters(TASKS[0], 10, 700)


@pytest.mark.parametrize("name", GENERATED)
def test_the_vocabulary_is_closed(name: str) -> None:
    data = make_data(name, 1500, 300)
    vocabulary = {*(characters_vocabulary() if name in TASKS else people_vocabulary())}
    texts = [
        text
        for part in (data.train, data.test)
        for column in part.to_dict().values()
        for text in column
    ]
    assert {word for text in texts for word in words_of(text)} <= vocabulary


def test_the_vocabulary_is_small_and_its_names_are_words() -> None:
    assert len(FIRST_NAMES.split()) == len(LAST_NAMES.split()) == 80 and len(NAMES) == 160
    assert all(name.isalpha() for name in NAMES)
    assert len({*characters_vocabulary()} - NAMES) <= 510


def test_an_article_says_its_facts_twice() -> None:
    train, test = make_people_articles(40, 10, seed=0)
    assert len(train) == 40 and len(test) == 10
    for article in train:
        sentences = article.removesuffix(".").split(". ")
        assert len(sentences) == 8
        names = [sentence.split(" is ")[1] for sentence in sentences[:4]]
        things = [sentence.split(" is ")[0].split(" of ")[1] for sentence in sentences[:4]]
        told = {frozenset(fact) for fact in zip(names, things, strict=True)}
        again = {
            frozenset((name, thing))
            for sentence in sentences[4:]
            for name in names
            for thing in things
            if sentence.startswith(name) and sentence.endswith(thing)
        }
        assert again == told
    people = [{*re.findall(r"[A-Z]\w+ [A-Z]\w+", " ".join(part))} for part in (train, test)]
    assert not people[0] & people[1]


def test_the_responses_of_cut_articles_speak_of_people_in_the_context() -> None:
    for record in make_data("people-text", 200, 20).train:
        assert record["context"].count(" is ") == 4
        assert {*words_of(record["response"])} & NAMES <= {*words_of(record["context"])}
