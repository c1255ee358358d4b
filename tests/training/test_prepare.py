"""Preparation: the loss by hand, its two formats, and that it teaches them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gdprompt_fast.data import Example, Limits, prompt_rows, query_rows, tokenise_triples
from gdprompt_fast.data.people import make_people_data, people_tokenizer
from gdprompt_fast.training.finetune import (
    PrepareOptions,
    fine_tune,
    fine_tuning_backward,
    row_loss,
)
from helpers.models import llama

TOKENIZER = people_tokenizer()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    data = make_people_data(1, 4, seed=0).test
    return tokenise_triples(data, TOKENIZER, Limits(64, 64, 64)).examples


@pytest.fixture
def model() -> nn.Module:
    return llama(len(TOKENIZER), tie_word_embeddings=True)


def by_hand(model: nn.Module, examples: list[Example], rows: str, text_weight: float) -> float:
    """The loss row by row, from all logits."""
    total = 0.0
    for example in examples:
        start, response = list(getattr(example, rows)), list(example.response)
        ids = torch.tensor([start + response])
        nll = -model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        text, answer = nll[: len(start) - 1], nll[len(start) - 1 :]
        total += float(answer.mean() + text_weight * text.mean())
    return total / len(examples)


@pytest.mark.parametrize("text_weight", [0.0, 0.3])
@pytest.mark.parametrize("rows", ["prompt", "query"])
def test_the_loss_is_the_one_of_each_row_alone(
    model: nn.Module, examples: list[Example], rows: str, text_weight: float
) -> None:
    padded = {"prompt": prompt_rows, "query": query_rows}[rows](examples)
    got = float(row_loss(model, padded, text_weight))
    assert got == pytest.approx(by_hand(model, examples, rows, text_weight), rel=1e-5)


def test_a_step_trains_both_formats_alike(model: nn.Module, examples: list[Example]) -> None:
    loss = float(fine_tuning_backward(model, examples))
    halves = [row_loss(model, rows(examples)) for rows in (prompt_rows, query_rows)]
    assert loss == pytest.approx(float(sum(halves)) / 2, rel=1e-6)
    parameters = list(model.parameters())
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(sum(halves) / 2, parameters), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient)


def test_preparation_teaches_the_answers(model: nn.Module, examples: list[Example]) -> None:
    before = fine_tuning_backward(model, examples)
    model.zero_grad()
    fine_tune(model, examples, PrepareOptions(steps=40, batch_size=4, lr=1e-2, warmup_steps=4))
    assert fine_tuning_backward(model, examples) < 0.1 * before


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 0), ("lr", 0.0), ("text_weight", -1.0), ("batch_size", 0)]
)
def test_a_bad_option_is_named(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{option}: expected .* got {value}"):
        PrepareOptions(**{option: value})
