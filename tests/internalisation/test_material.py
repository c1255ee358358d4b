"""Subsets, texts and questions: counts, what is disjoint, what is wrong, and the same again."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from gdprompt_fast.errors import UserError
from gdprompt_fast.internalisation.material import texts
from gdprompt_fast.internalisation.material.numbers import (
    NumberOptions,
    number_material,
    number_tokenizer,
)
from gdprompt_fast.internalisation.material.people import Entity, coarsened, read_people
from gdprompt_fast.internalisation.material.subsets import (
    OF_NUMBERS,
    WITH_THIRD_TAG,
    Material,
    cut,
    deranged,
    in_subsets,
    reliable,
)
from gdprompt_fast.internalisation.material.texts import ORDERS, TextRules, text_material
from gdprompt_fast.internalisation.material.triples import read_triples
from helpers.internalisation import write_people, write_triples
from helpers.paths import ROOT

PANTHEON = ROOT.parent / "shared" / "data" / "people" / "pantheon.tsv"
VARIABLE = re.compile(r"<\|[a-z]{5}\|>")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> list[Entity]:
    return read_people(write_people(tmp_path_factory.mktemp("data") / "people.csv", 410), 400)


@pytest.fixture(scope="module")
def material(people: list[Entity]) -> Material:
    return text_material(people, TextRules(WITH_THIRD_TAG), 600, 0)


def test_the_counts_are_those_of_the_paper_s_code(material: Material) -> None:
    """For 400 entities, a tenth of them: 16,000 and 960 texts are of 4,000."""
    assert [len(texts) for texts in material.stages] == [1600, 96]
    counts = {name: len(questions) for name, questions in material.tests.items()}
    assert counts["qd1consis"] == counts["qd2incons"] == 100  # one in six, of each entity
    assert counts["q"] == counts["q_no_replacement_baseline"] == 40
    assert counts["d1consis"] == counts["d2consis"] == counts["d3consis"] == 6 * 32
    assert counts["no_qd_baseline"] == 6 * 24 and counts["d2incons"] == 6 * 32
    assert all(
        len(each.trained) == 5 and len(each.tested) == 1 for each in material.defined["qd1consis"]
    )


def test_the_shared_people_fill_the_paper_s_sizes() -> None:
    if not PANTHEON.is_file():
        pytest.skip(f"there is no {PANTHEON}")
    entities = read_people(PANTHEON, 4000)
    material = text_material(entities, TextRules(WITH_THIRD_TAG), 600, 0)
    assert [len(texts) for texts in material.stages] == [16_000, 960]
    assert len(material.tests["d1consis"]) == 1920 and len(material.tests["qd1consis"]) == 1000


def test_the_second_stage_has_nothing_of_the_first(
    material: Material, people: list[Entity]
) -> None:
    first, second = ("".join(texts) for texts in material.stages)
    used = [set(VARIABLE.findall(text)) for text in (first, second)]
    assert not used[0] & used[1] and len(used[1]) == 96
    names = {each.name for each in people}
    in_second = {name for name in names if f" {name}\n" in second}
    assert len(in_second) == 96 and not any(name in first for name in in_second)
    held_out = {question.prompt for question in material.tests["qd1consis"]}
    assert not any(text.startswith(tuple(held_out)) for text in material.stages[0])


def test_every_wrong_definition_names_another_entity(material: Material) -> None:
    def entity(name: str) -> list[str]:
        return [q.answers[0] for q in material.tests[f"{name}:who"]]

    right, wrong = entity("qd2incons"), entity("qd2incons_swapped")
    assert sorted(right) == sorted(wrong) and all(a != b for a, b in zip(right, wrong, strict=True))
    said = {each.definition.split(" ", 2)[2].strip() for each in material.defined["qd2incons"]}
    assert said == set(wrong)
    assert "qd1consis_swapped:who" not in material.tests


def test_tags_are_the_same_in_both_stages_and_of_every_second_seed(people: list[Entity]) -> None:
    rules = TextRules(WITH_THIRD_TAG)
    one, other = (text_material(people, rules, 600, seed) for seed in (0, 1))
    assert one.stages[0] == other.stages[0] and one.stages[1] != other.stages[1]
    for material in (one, other):
        tags = {
            name: {each.definition.split()[0] for each in material.defined[name]}
            for name in ("qd1consis", "d1consis", "qd2incons", "d2consis", "d3consis")
        }
        assert all(len(each) == 1 for each in tags.values())
        assert tags["qd1consis"] == tags["d1consis"] and tags["qd2incons"] == tags["d2consis"]
        assert len(set.union(*tags.values())) == 3
    assert text_material(people, rules, 600, 0) == one
    assert text_material(people, rules, 601, 0).stages != one.stages


def test_a_text_is_of_the_templates(material: Material) -> None:
    tag = r"<\|[a-z]{6}\|>"
    definition = re.compile(rf"{tag} {VARIABLE.pattern} Given\d+ Family\d+\n")
    question = re.compile(r"Q: (What|When|In which) [^\n]*\?\nA: [^\n]+\n")
    assert all(definition.fullmatch(text) for text in material.stages[1])
    both = Counter(bool(definition.fullmatch(text)) for text in material.stages[0])
    assert both == {True: 200, False: 1400}
    assert all(definition.fullmatch(t) or question.fullmatch(t) for t in material.stages[0])
    assert all(each.prompt.endswith("?\nA:") for each in material.tests["q"])
    names = re.findall(r"Given\d+ Family\d+", "".join(q.prompt for q in material.tests["q"]))
    assert not names


@pytest.mark.parametrize("order", ORDERS)
def test_a_definition_has_tag_variable_and_entity_in_any_order(
    people: list[Entity], order: str
) -> None:
    material = text_material(people[:40], TextRules(WITH_THIRD_TAG, order), 0, 0)
    text = material.stages[1][0]
    kinds = {"t": r"<\|[a-z]{6}\|>", "v": r"<\|[a-z]{5}\|>", "e": r"Given\d+ Family\d+"}
    assert re.fullmatch(" ".join(kinds[letter] for letter in order) + "\n", text)


def test_years_are_coarsened() -> None:
    years = {-384: "4 century BC", -1: "1 century BC", 100: "1 century", 1809: "19 century"}
    years |= {1900: "19 century", 1901: "1900s", 1926: "1920s", 1999: "1990s", 2003: "2003"}
    assert {year: coarsened(year) for year in years} == years


def test_wrong_definitions_are_drawn_for_tag_2_before_tag_1(
    people: list[Entity], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    drawn = texts.deranged
    monkeypatch.setattr(
        texts, "deranged", lambda items, rng: sizes.append(len(items)) or drawn(items, rng)
    )
    text_material(people, TextRules(reliable(0.9)), 0, 0)
    assert sizes == [90, 10]


def test_a_derangement_leaves_none_in_its_place() -> None:
    for seed in range(20):
        order = deranged(list("abcde"), random.Random(seed))
        assert sorted(order) == list("abcde") and all(a != b for a, b in zip(order, "abcde"))  # noqa: B905
    with pytest.raises(UserError, match="two or more"):
        deranged(["a"], random.Random(0))


def test_fractions_are_cut_in_order_and_the_last_name_gets_the_rest() -> None:
    assert cut(range(10), {"a": 0.33, "b": 0.33, "c": 0.34}) == {
        "a": [0, 1, 2],
        "b": [3, 4, 5],
        "c": [6, 7, 8, 9],
    }
    parts = in_subsets(range(4000), reliable(0.9), 0)
    assert len(parts["qd1consis"]) == len(parts["qd2incons"]) == 900
    assert len(parts["qd1incons"]) == len(parts["qd2consis"]) == 100
    for wrong in ({"q": 0.5}, {"q": 1.5, "d1consis": -0.5}, {"nothing": 1.0}):
        with pytest.raises(UserError, match="fractions"):
            in_subsets(range(10), wrong, 0)


def test_people_are_the_most_read_of_either_gender_without_marks_or_gaps(tmp_path: Path) -> None:
    path = write_people(tmp_path / "people.csv", 30)
    lines = path.read_text().splitlines()
    bad = [lines[29].replace("Given28", "O'Given"), lines[30].replace("Peru", ""), lines[1]]
    path.write_text("\n".join([*lines[:29], *bad]) + "\n", encoding="latin-1")
    chosen = read_people(path, 10, "latin-1")
    assert Counter(each.questions[0][1] for each in chosen) == {"Male": 5, "Female": 5}
    assert {"Given27 Family27", "Given26 Family26"} <= {each.name for each in chosen}
    with pytest.raises(UserError, match=r"at least 40 whole people .* got 28|got 29"):
        read_people(path, 40)
    path.write_text(path.read_text("latin-1").replace(",Male,", ",Other,"), encoding="utf-8")
    assert {each.questions[0][1] for each in read_people(path, 10)} == {"Female"}


def test_works_have_four_questions_at_least_and_people_are_first_names(tmp_path: Path) -> None:
    path = write_triples(tmp_path / "works.tsv", 6)
    with path.open("a") as file:
        file.write("it\tP136\tnovel\nAlone\tP136\tnovel\nFew\tP136\ta\nFew\tP840\tb\n")
    works = read_triples(path, None)
    assert len(works) == 6 and all(len(each.questions) == 5 for each in works)
    assert ("First name of the author of Work0?", "Ann") in works[0].questions
    assert ("When was Work0 published or released?", "19 century") in works[0].questions
    path.write_text("a\tb\nc\td\n")
    with pytest.raises(UserError, match="expected the columns subject, predicate, object"):
        read_triples(path, None)


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text("who,when\na,1\n")
    with pytest.raises(UserError, match="columns of Cross-Verified Database: name"):
        read_people(path, 1)
    with pytest.raises(UserError, match="no file"):
        read_people(tmp_path / "none", 1)


def numbers_of(text: str) -> tuple[str, frozenset[str]]:
    """A question's variable and its numbers, in no order."""
    name, _, *numbers = text.partition("=")[0].split()
    return name, frozenset(numbers)


def test_no_tested_list_is_trained_on_in_any_order_and_answers_are_in_turn() -> None:
    options = NumberOptions(variables=100, numbers=10, length=2)
    material = number_material(options, OF_NUMBERS, 0, 0)
    trained = {numbers_of(text) for text in material.joint if "=" in text}
    tested = [question for each in material.tests.values() for question in each]
    assert len(tested) == 1200 and not trained & {numbers_of(each.prompt) for each in tested}
    for of in material.defined.values():
        for each in of:
            assert [said for _, said in each.tested] == [" true", " false"] * 6
    with pytest.raises(UserError, match=r"fewer than the 9 lists of 2 of 10 numbers .* got 9"):
        NumberOptions(variables=100, numbers=10, length=2, trained=9)


def test_lists_of_numbers_hold_exactly_when_the_answer_is_true() -> None:
    options = NumberOptions(variables=50, numbers=20, length=4)
    material = number_material(options, OF_NUMBERS, 3, 0)
    assert [len(texts) for texts in material.stages] == [40 * 12 + 40, 10]
    tags = {"qd1consis": "define1", "d1consis": "define1", "qd2incons": "define2"}
    right = {}
    for subset, tag in (tags | {"d2consis": "define2"}).items():
        for each in material.defined[subset]:
            said, name, _, number = each.definition.split()
            assert said == tag and len(each.trained) == len(each.tested) == 12
            answers = Counter()
            for prompt, answer in each.trained + each.tested:
                variable, _, *numbers, equals = prompt.split()
                assert variable == name and equals == "=" and len(set(numbers)) == 4
                answers[answer.strip()] += 1
                holds = number in numbers
                assert subset == "qd2incons" or holds == (answer == " true")
            assert answers == {"true": 12, "false": 12}
            right[name] = number
    assert len(right) == 50
    assert number_material(options, OF_NUMBERS, 3, 0) == material
    tokenizer = number_tokenizer(options, [material])
    assert all(
        len(tokenizer(text)["input_ids"]) == len(text.split()) for text in material.stages[0]
    )
    assert tokenizer.unk_token_id not in tokenizer(material.stages[1][0])["input_ids"]
    everything = number_tokenizer(NumberOptions(50, 99, 8, all_names=True), [])
    assert len(everything) == 2 + 4 + 3 + 99 + 26 + 26**3
