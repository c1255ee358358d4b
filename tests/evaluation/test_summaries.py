"""Means, standard errors, files of predictions, and the choice of the inner rate."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gdprompt_fast.data import Example
from gdprompt_fast.data.people import people_tokenizer
from gdprompt_fast.evaluation import (
    SETTINGS,
    InnerStep,
    Scores,
    evaluate,
    read_predictions,
    tune_inner_lr,
    write_predictions,
)
from helpers.scoring import (
    INNER,
    scores_in,
)

SCORES = Scores(
    nll=torch.tensor([2.0, 6.0, 4.0, 4.0]),
    tokens=torch.tensor([1, 3, 2, 2]),
    correct=torch.tensor([True, False, True, True]),
    token_accuracy=torch.tensor([1.0, 0.0, 1.0, 1.0]),
    predictions=[[1], [1, 2, 3], [1, 2], [1, 2]],
)


def test_summaries_have_means_and_standard_errors() -> None:
    answered = SCORES.with_answers(
        ["Ada", "Bob", "Ada Bob", "x y"], [["Ada"], ["Ada"], ["Ada"], ["y"]]
    )
    summary = answered.summary()
    assert (summary.examples, summary.tokens) == (4, 8)
    assert summary.accuracy == summary.token_accuracy == 0.75
    assert summary.accuracy_se == summary.token_accuracy_se == pytest.approx(0.5 / 2)
    assert summary.nll_per_example == 4.0
    assert summary.nll_per_example_se == pytest.approx((8 / 3) ** 0.5 / 2)
    assert summary.nll_per_token == 2.0
    assert summary.nll_per_token_se == 0.0  # every response has exactly 2.0 per token
    assert summary.exact_match == 0.25
    assert summary.exact_match_se == pytest.approx(0.5 / 2)
    assert summary.f1 == pytest.approx((1 + 0 + 2 / 3 + 2 / 3) / 4)
    squares = [(value - 7 / 12) ** 2 for value in (1, 0, 2 / 3, 2 / 3)]
    assert summary.f1_se == pytest.approx((sum(squares) / 3) ** 0.5 / 2)


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    single = Scores.concatenate([SCORES]).summary()
    assert single == SCORES.summary()
    first = Scores(*(part[:1] for part in list(vars(SCORES).values())[:5]))
    for scores in (first, replace(first, nll=torch.tensor([math.inf]))):
        fields = json.loads(json.dumps(asdict(scores.summary()), allow_nan=False))
        assert fields["accuracy"] == 1.0 and fields["accuracy_se"] is None
        assert fields["nll_per_token_se"] is None and fields["f1"] is None
    assert fields["nll_per_token"] is None


def test_predictions_survive_writing_and_reading(
    model: torch.nn.Module, examples: list[Example], tmp_path: Path
) -> None:
    tokenizer = people_tokenizer()
    line_breaks = ("Ada\u2028 Bob", "new\nline")
    examples = [replace(examples[0], answers=line_breaks), *examples[1:]]
    scores = evaluate(model, tokenizer, examples, INNER, 4, answer_tokens=5, contexts_per_group=2)
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, examples, scores)
    rows = read_predictions(path)
    assert len(rows) == 6  # the seventh example is no whole group
    assert rows[0]["answers"] == list(line_breaks)
    for index, row in enumerate(rows):
        texts = (row["context"], row["query"], row["response"])
        assert texts == examples[index].texts[:3]
        assert list(row["settings"]) == list(SETTINGS)
        for setting, of in row["settings"].items():
            assert of == {
                "answer": scores[setting].answers[index],
                "exact_match": bool(scores[setting].exact_match[index]),
                "f1": float(scores[setting].f1[index]),
                "correct": bool(scores[setting].correct[index]),
                "token_accuracy": float(scores[setting].token_accuracy[index]),
                "nll": float(scores[setting].nll[index]),
            }
    lost = replace(SCORES, nll=torch.full((4,), math.nan))
    write_predictions(path, examples, {"prompt": lost})
    of = read_predictions(path)[0]["settings"]["prompt"]
    assert of["nll"] is None and of["answer"] is None and of["f1"] is None


def test_the_inner_rate_is_tuned_for_accuracy_then_nll(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    grid = (0.0, 0.01, 3e38)
    tuned = tune_inner_lr(model, examples, InnerStep(lr=7.0, steps=1), grid, batch_size=4)
    assert set(tuned.tried) == set(grid)
    assert tuned.inner == replace(InnerStep(lr=7.0), lr=tuned.inner.lr)
    assert tuned.tried[3e38].nll_per_token is None
    best = max(grid[:2], key=lambda lr: (tuned.tried[lr].accuracy, -tuned.tried[lr].nll_per_token))
    assert tuned.inner.lr == best


def test_the_inner_rate_of_groups_is_tuned_in_groups(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    for one_after_another in (False, True):
        grouping = dict(contexts_per_group=3, one_after_another=one_after_another)
        tuned = tune_inner_lr(model, examples, INNER, [0.5], batch_size=4, **grouping)
        assert tuned.tried[0.5] == scores_in("fine_tuning", model, examples, **grouping).summary()
