"""Scores and answers of a batch: those of one row after another, to the token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset

from gdprompt_fast.data import Example, query_rows, with_responses
from gdprompt_fast.data.people import people_tokenizer
from gdprompt_fast.evaluation import (
    SETTINGS,
    InnerStep,
    Scores,
    evaluate,
    score_rows,
    with_irrelevant_contexts,
)
from gdprompt_fast.teacher import greedy_answers
from helpers.scoring import (
    INNER,
    VOCABULARY,
    SpelledIds,
    ending_in_some,
    ending_with,
    gpt2,
    llama,
    score_one,
    scores_in,
)


@pytest.mark.parametrize("setting", ["no_context", "prompt"])
def test_batched_scores_equal_one_row_at_a_time(
    setting: str, model: torch.nn.Module, examples: list[Example]
) -> None:
    starts = [e.prompt if setting == "prompt" else e.query for e in examples]
    said = greedy_answers(model, starts, eos=-1, max_tokens=4)
    for answer, wrong in zip(said, [None, 0, 1, 2, 3, 0, None], strict=True):
        if wrong is not None:
            answer[wrong] = (answer[wrong] + 1) % VOCABULARY
    examples = with_responses(
        examples, [answer[:n] for answer, n in zip(said, [4, 3, 4, 4, 4, 1, 2], strict=True)]
    )
    scores = scores_in(setting, model, examples)
    expected = [score_one(model, s, e.response) for s, e in zip(starts, examples, strict=True)]
    torch.testing.assert_close(
        scores.nll, torch.tensor([nll for nll, _ in expected]), rtol=1e-4, atol=1e-4
    )
    assert scores.token_accuracy.tolist() == pytest.approx([share for _, share in expected])
    assert {0.0, 1.0} < set(scores.token_accuracy.tolist())
    assert scores.tokens.tolist() == [len(example.response) for example in examples]


def test_correct_means_that_greedy_decoding_gives_the_response(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    said = greedy_answers(model, [list(e.query) for e in examples], eos=-1, max_tokens=3)
    wrong_at = [None, 0, 1, 2, None, 0, None]
    responses = [list(answer) for answer in said]
    for response, position in zip(responses, wrong_at, strict=True):
        if position is not None:
            response[position] = (response[position] + 1) % VOCABULARY
    scores = score_rows(model, query_rows(with_responses(examples, responses)))
    assert scores.correct.tolist() == [position is None for position in wrong_at]


@pytest.mark.parametrize("contexts", [1, 3], ids=["own θ'", "θ' of 3 contexts"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_batch_is_scored_and_answered_as_group_by_group_to_the_token(
    build: Callable[[], torch.nn.Module], setting: str, contexts: int, examples: list[Example]
) -> None:
    model = build()
    examples = ending_with(ending_in_some(model, examples), examples)
    options: dict[str, Any] = dict(
        tokenizer=SpelledIds(), answer_tokens=12, contexts_per_group=contexts
    )
    together = scores_in(setting, model, examples, batch_size=7, **options)
    assert len(together) == len(examples) // contexts * contexts
    groups = range(0, len(together), contexts)
    alone = Scores.concatenate(
        [
            scores_in(setting, model, examples[g : g + contexts], batch_size=1, **options)
            for g in groups
        ]
    )
    assert together.answers == alone.answers
    assert together.predictions == alone.predictions
    assert together.correct.equal(alone.correct)
    torch.testing.assert_close(together.nll, alone.nll, rtol=1e-4, atol=1e-4)
    if setting == "prompt":
        lengths = {len(answer.split()) for answer in together.answers or []}
        assert len(lengths) > 1  # some end before others


def test_answers_are_texts_without_special_tokens_scored_against_all_gold_ones(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    tokenizer = people_tokenizer()
    said = greedy_answers(model, [e.query for e in examples], tokenizer.eos_token_id, 5)
    said_texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
    right = (f"The {said_texts[1].upper()}!", "Ada")
    half = (said_texts[0].split()[0],)
    golds = [half, right, *(example.answers for example in examples[2:])]
    examples = [replace(e, answers=gold) for e, gold in zip(examples, golds, strict=True)]
    scores = scores_in("no_context", model, examples, tokenizer=tokenizer, answer_tokens=5)
    assert scores.answers == said_texts
    assert scores.exact_match is not None and scores.f1 is not None
    assert scores.exact_match.tolist() == [False, True, *[False] * 5]
    words = len([word for word in said_texts[0].split() if word.isalpha()])
    assert scores.f1[:2].tolist() == pytest.approx([2 / (words + 1), 1.0])
    summary = scores.summary()
    assert summary.exact_match == pytest.approx(1 / 7)
    assert summary.f1 == pytest.approx(float(scores.f1.mean()))


def test_without_answer_tokens_nothing_is_generated(
    model: torch.nn.Module, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gdprompt_fast.evaluation.settings.greedy_answers", None)
    scores = scores_in("prompt", model, [replace(e, answers=()) for e in examples])
    assert scores.answers is None and scores.summary().exact_match is None


def test_irrelevant_contexts_are_a_permutation_without_a_fixed_text() -> None:
    texts = ["a", "b", "b", "c", "a", "b"]  # "b" in half of the records
    records = Dataset.from_list(
        [{"context": c, "query": f"q{i}", "response": "r"} for i, c in enumerate(texts)]
    )
    found = set()
    for seed in range(30):
        moved = with_irrelevant_contexts(records, seed)
        assert (
            moved.remove_columns("context").to_list() == records.remove_columns("context").to_list()
        )
        assert sorted(moved["context"]) == sorted(texts)
        assert all(new != old for new, old in zip(moved["context"], texts, strict=True))
        assert moved.to_list() == with_irrelevant_contexts(records, seed).to_list()
        found.add(tuple(moved["context"]))
    assert len(found) > 1
    with pytest.raises(ValueError, match="no context in more than half of them, got one in 3 of 5"):
        with_irrelevant_contexts(records.select(range(1, 6)), seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"settings": ["prompt", "promt"]},
            r"settings: expected some of .*got \['prompt', 'promt'\]",
        ),
        ({"settings": []}, "settings: expected some of"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"answer_tokens": -1}, "answer_tokens: expected an integer >= 0, got -1"),
        ({"answer_tokens": 40}, r"answer_tokens: expected at most \d+ after a row of \d+ tokens"),
        ({"contexts_per_group": 0}, "contexts_per_group: expected an integer >= 1, got 0"),
        ({"contexts_per_group": 8}, "contexts_per_group: expected at most the number .* 7, got 8"),
        ({"inner": InnerStep(lr=-1.0)}, "inner_lr: expected a finite number >= 0"),
        ({"inner": InnerStep(lr=0.1, params="lora")}, "inner_params: expected to select some"),
    ],
)
def test_bad_arguments_are_errors_before_anything_is_run(
    options: dict[str, Any], message: str, examples: list[Example]
) -> None:
    model = gpt2()
    model.forward = None
    arguments = {"inner": INNER, "batch_size": 4, "answer_tokens": 8, **options}
    with pytest.raises(ValueError, match=message):
        evaluate(model, people_tokenizer(), examples, **arguments)


def test_what_cannot_be_scored_or_stepped_on_is_an_error(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    without = [*examples[1:], replace(examples[0], answers=())]
    with pytest.raises(ValueError, match="examples: expected gold answers"):
        evaluate(model, people_tokenizer(), without, INNER, 4)
    with pytest.raises(ValueError, match=r"one_after_another: expected float32 .* torch\.bfloat16"):
        scores_in("fine_tuning", model.bfloat16(), examples, one_after_another=True)


@pytest.mark.parametrize("contexts", [1, 3])
def test_grouped_by_length_every_example_has_its_own_scores(
    contexts: int, model: torch.nn.Module, examples: list[Example]
) -> None:
    options: dict[str, Any] = dict(contexts_per_group=contexts, answer_tokens=3)
    inner, tokenizer = InnerStep(lr=0.3), SpelledIds()
    grouped, plain = (
        evaluate(model, tokenizer, examples, inner, 3, group_by_length=by_length, **options)
        for by_length in (True, False)
    )
    for setting, scores in plain.items():
        torch.testing.assert_close(grouped[setting].nll, scores.nll, rtol=1e-4, atol=1e-4)
        assert grouped[setting].tokens.tolist() == scores.tokens.tolist()
        assert grouped[setting].answers == scores.answers
        assert grouped[setting].predictions == scores.predictions
