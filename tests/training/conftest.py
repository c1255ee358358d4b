"""Fixtures of the training's tests."""

from __future__ import annotations

import pytest

from gdprompt_fast.data import (
    Example,
    Limits,
    tokenise_triples,
)
from gdprompt_fast.data.people import make_people_data
from helpers.training import TOKENIZER


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    data = make_people_data(1, 5, seed=0).test  # fewer than the run draws: it goes round
    return tokenise_triples(data, TOKENIZER, Limits(64, 64, 64)).examples
