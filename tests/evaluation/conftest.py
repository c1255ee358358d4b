"""Fixtures of the evaluation's tests."""

from __future__ import annotations

import pytest
import torch

from gdprompt_fast.data import Example, Limits, tokenise_triples
from gdprompt_fast.data.people import make_people_data, people_tokenizer
from helpers.scoring import llama


@pytest.fixture
def model() -> torch.nn.Module:
    return llama()


@pytest.fixture
def examples() -> list[Example]:
    data = make_people_data(1, 7, seed=0).test.to_list()
    data[2]["context"] = data[2]["context"].split(".")[0]  # rows of different lengths
    data[4]["response"] = "Ada"
    data[5]["query"] = "who?"
    return tokenise_triples(data, people_tokenizer(), Limits(64, 64, 64)).examples
