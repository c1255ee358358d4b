"""Generated answers against gold ones, by the rules of SQuAD's official script."""

from __future__ import annotations

import pytest

from gdprompt_fast.evaluation import exact_match, f1, normalise


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  a\tan \n the  THE  ", ""),
        ("an apple, another theme", "apple another theme"),
        ("U.S.A.", "usa"),
        ("twenty-one", "twentyone"),
        ("a-b", "ab"),  # punctuation goes before articles
        ("don't (ever)", "dont ever"),
        ("A.", ""),
        ("“the” Ünïcode — dash", "“ ” ünïcode — dash"),  # only ASCII punctuation goes
        ("14\u00a0km", "14 km"),
    ],
)
def test_normalisation_is_the_official_one(text: str, normalised: str) -> None:
    assert normalise(text) == normalised


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "f1_expected"),
    [
        ("the Broncos", ["Denver Broncos", "Broncos."], True, 1.0),
        ("Denver Broncos", ["Broncos"], False, 2 / 3),
        ("the big red red dog", ["a red dog", "big cat red fish"], False, 2 * 2 / (4 + 2)),
        ("red red", ["red"], False, 2 / 3),  # a word counts as often as it is in both
        ("nothing shared", ["Broncos"], False, 0.0),
        ("", ["Broncos"], False, 0.0),
        ("the", ["Broncos", "a"], False, 0.0),  # a gold answer without words does not count …
        ("the", ["a", "!"], True, 1.0),  # … unless there is no other
        ("Broncos", ["a"], False, 0.0),
    ],
)
def test_exact_match_and_f1_are_those_of_the_best_gold_answer(
    answer: str, golds: list[str], exact: bool, f1_expected: float
) -> None:
    assert exact_match(answer, golds) is exact
    assert f1(answer, golds) == pytest.approx(f1_expected, abs=1e-12)
