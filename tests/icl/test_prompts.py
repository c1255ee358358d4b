"""Demonstrations and queries in tokens."""

from __future__ import annotations

import numpy as np
import pytest

from gdprompt_fast.data.words import word_tokenizer
from gdprompt_fast.errors import UserError
from gdprompt_fast.icl.prompts import Prompts, demonstrations, make_prompts
from gdprompt_fast.icl.tasks import Item, shuffled
from helpers.icl_tasks import vocabulary

TOKENIZER = word_tokenizer(vocabulary())
DEMOS = [
    Item("Review: red film Sentiment:", 1),
    Item("Review: dull blue plot Sentiment:", 0),
    Item("Review: long Sentiment:", 0),
]
QUERIES = [Item("Review: bright Sentiment:", 1), Item("Review: dull river Sentiment:", 0)]


def prompts(window: int = 100, **special: str) -> Prompts:
    return make_prompts(TOKENIZER, "mr", DEMOS, QUERIES, window, **special)


def words(ids: list[int]) -> str:
    return " ".join(TOKENIZER.convert_ids_to_tokens(ids))


def test_rows_are_as_the_paper_has_them() -> None:
    made = prompts()
    assert [words(text) for text in made.texts] == [
        "<s> Review : red film Sentiment : Positive",
        "<s> Review : dull blue plot Sentiment : Negative",
        "<s> Review : long Sentiment : Negative",
    ]
    assert words(made.context) == (
        "<s> Review : red film Sentiment : Positive </s> "
        "Review : dull blue plot Sentiment : Negative </s> "
        "Review : long Sentiment : Negative </s>"
    )
    assert [words(query) for query in made.queries] == [
        "Review : bright Sentiment :",
        "Review : dull river Sentiment :",
    ]
    assert words(made.options) == "Negative Positive" and made.gold == [1, 0]
    for (start, end), text in zip(made.spans, made.texts, strict=True):
        assert made.context[start:end] == text[1:]


@pytest.mark.parametrize(("window", "fit"), [(16, 1), (17, 2), (25, 2), (26, 3)])
def test_demonstrations_fit_while_rows_are_shorter_than_the_window(window: int, fit: int) -> None:
    """Context, the next one with EOS, and the longest query with its candidate, of 7 tokens."""
    made = prompts(window + 7 - 1 if fit > 3 else window + 7)
    lengths = [1 + 8, 1 + 8 + 9, 1 + 8 + 9 + 7]
    assert len(made.spans) == sum(length + 7 < window + 7 for length in lengths)
    assert len(made.texts) == 3


def test_not_one_that_fits_is_refused() -> None:
    with pytest.raises(
        UserError, match="window: expected room for a demonstration and the longest"
    ):
        prompts(16)


def test_bos_and_eos_may_be_other_tokens() -> None:
    made = prompts(bos="<pad>", eos="<pad>")
    assert words(made.context[:1] + made.context[8:9] + made.texts[0][:1]) == "<pad> <pad> <pad>"
    with pytest.raises(UserError, match="eos: expected a token of the tokenizer, got '<end>'"):
        prompts(eos="<end>")
    tokenizer = word_tokenizer(vocabulary())
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="bos: expected a token, since the tokenizer has none"):
        make_prompts(tokenizer, "mr", DEMOS, QUERIES, 100)


def test_answers_are_one_token_each_and_differ() -> None:
    unknown = word_tokenizer([each for each in vocabulary() if each not in ("True", "False")])
    with pytest.raises(UserError, match="options: expected different tokens for True, False, Nei"):
        make_prompts(unknown, "cb", DEMOS, QUERIES, 100)
    several = word_tokenizer(vocabulary())
    several.add_tokens(["Posit"])
    with pytest.raises(
        UserError, match="expected each to be one token of the tokenizer, got 2 for"
    ):
        make_prompts(several, "mr", DEMOS, QUERIES, 100)


def test_demonstrations_are_the_first_of_the_shuffled_in_the_order_of_a_permutation() -> None:
    items = [Item(str(index), 0) for index in range(20)]
    drawn = shuffled(items, 7)[:4]
    assert demonstrations(items, 4, 7, 0) == drawn
    generator = np.random.RandomState(7)
    orders = [generator.permutation(4) for _ in range(5)]
    for number in (1, 2, 5):
        expected = [drawn[index] for index in orders[number - 1]]
        assert demonstrations(items, 4, 7, number) == expected
    with pytest.raises(UserError, match="demonstrations: expected at most 20, all there are, got"):
        demonstrations(items, 21, 7, 0)
