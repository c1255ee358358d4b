"""No Context, Prompt and Fine-Tuning: scores, batches of adapted rows, and the tuned baseline."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from gdprompt_fast.data import Example, Limits, query_rows, tokenise_triples, with_responses
from gdprompt_fast.data.people import make_people_data, people_tokenizer
from gdprompt_fast.evaluation import (
    InnerStep,
    Scores,
    evaluate,
    fine_tuned_answers,
    fine_tuning_scores,
    score_rows,
    tune_inner_lr,
)
from gdprompt_fast.evaluation.settings import no_context_scores, prompt_scores
from gdprompt_fast.teacher import greedy_answers

EOS = 2


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=134,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def examples() -> list[Example]:
    data = make_people_data(7, 1, seed=0).train.to_list()
    data[2]["context"] = data[2]["context"].split(".")[0]  # rows of different lengths
    data[4]["response"] = "Ada"
    return tokenise_triples(data, people_tokenizer(), Limits(64, 64, 64)).examples


def nll_one_by_one(model: torch.nn.Module, start: list[int], response: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([start + response]), use_cache=False).logits[0]
    predicting = logits[len(start) - 1 : -1]
    return float(F.cross_entropy(predicting, torch.tensor(response), reduction="sum"))


def test_batched_nll_equals_one_row_at_a_time(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    for scores, starts in (
        (no_context_scores(model, examples, batch_size=3), [e.query for e in examples]),
        (prompt_scores(model, examples, batch_size=3), [e.prompt for e in examples]),
    ):
        expected = [
            nll_one_by_one(model, list(start), list(example.response))
            for start, example in zip(starts, examples, strict=True)
        ]
        torch.testing.assert_close(scores.nll, torch.tensor(expected), rtol=1e-4, atol=1e-4)
        assert scores.tokens.tolist() == [len(example.response) for example in examples]


def test_correct_means_that_greedy_decoding_gives_the_response(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    said = greedy_answers(model, [list(e.query) for e in examples], eos=-1, max_tokens=3)
    wrong_at = [None, 0, 1, 2, None, 0, None]
    responses = [list(answer) for answer in said]
    for response, position in zip(responses, wrong_at, strict=True):
        if position is not None:
            response[position] = (response[position] + 1) % 134
    scores = score_rows(model, query_rows(with_responses(examples, responses)))
    assert scores.correct.tolist() == [position is None for position in wrong_at]


def test_fine_tuning_in_a_batch_equals_one_at_a_time_to_the_token(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    inner = InnerStep(lr=0.5)
    together = fine_tuning_scores(model, examples, inner, batch_size=4)
    alone = Scores.concatenate(
        [fine_tuning_scores(model, [example], inner, batch_size=1) for example in examples]
    )
    assert together.predictions == alone.predictions
    assert together.correct.equal(alone.correct)
    torch.testing.assert_close(together.nll, alone.nll, rtol=1e-4, atol=1e-4)


def dense_inner_step(model: torch.nn.Module, context: list[int], lr: float) -> torch.nn.Module:
    """θ − η ∇L(context) as a model of its own."""
    adapted = copy.deepcopy(model)
    ids = torch.tensor([context])
    logits = adapted(input_ids=ids, use_cache=False).logits[0, :-1]
    F.cross_entropy(logits, ids[0, 1:]).backward()
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter -= lr * parameter.grad
    return adapted


def test_fine_tuning_scores_the_query_at_the_adapted_weights(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    before = copy.deepcopy(model.state_dict())
    scores = fine_tuning_scores(model, examples, InnerStep(lr=0.5), batch_size=4)
    for index, example in enumerate(examples):
        adapted = dense_inner_step(model, list(example.context), lr=0.5)
        expected = nll_one_by_one(adapted, list(example.query), list(example.response))
        assert float(scores.nll[index]) == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fine_tuned_answers_are_those_of_the_adapted_weights(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    answers = fine_tuned_answers(model, examples, InnerStep(lr=0.5), EOS, max_tokens=4)
    for example, answer in zip(examples, answers, strict=True):
        adapted = dense_inner_step(model, list(example.context), lr=0.5)
        assert greedy_answers(adapted, [list(example.query)], EOS, max_tokens=4) == [answer]


def test_an_inner_rate_of_zero_leaves_fine_tuning_at_no_context(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    scores = evaluate(model, examples, InnerStep(lr=0.0), batch_size=3)
    torch.testing.assert_close(scores["fine_tuning"].nll, scores["no_context"].nll)
    assert not torch.allclose(scores["prompt"].nll, scores["no_context"].nll)


def test_summaries_have_means_and_standard_errors() -> None:
    scores = Scores(
        nll=torch.tensor([2.0, 6.0, 4.0, 4.0]),
        tokens=torch.tensor([1, 3, 2, 2]),
        correct=torch.tensor([True, False, True, True]),
        predictions=[[1], [1, 2, 3], [1, 2], [1, 2]],
    )
    summary = scores.summary()
    assert (summary.examples, summary.tokens) == (4, 8)
    assert summary.accuracy == 0.75
    assert summary.accuracy_se == pytest.approx(0.5 / 2)
    assert summary.nll_per_example == 4.0
    assert summary.nll_per_example_se == pytest.approx((8 / 3) ** 0.5 / 2)
    assert summary.nll_per_token == 2.0
    assert summary.nll_per_token_se == 0.0  # every response has exactly 2.0 per token


def test_the_inner_rate_is_tuned_for_accuracy_then_nll(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    grid = (0.0, 0.01, 3e38)
    tuned = tune_inner_lr(model, examples, InnerStep(lr=7.0, steps=1), grid, batch_size=4)
    assert set(tuned.tried) == set(grid)
    assert tuned.inner == replace(InnerStep(lr=7.0), lr=tuned.inner.lr)
    usable = {lr: s for lr, s in tuned.tried.items() if math.isfinite(s.nll_per_token)}
    best = max(usable, key=lambda lr: (usable[lr].accuracy, -usable[lr].nll_per_token))
    assert tuned.inner.lr == best
    assert 3e38 not in usable and tuned.inner.lr != 3e38
