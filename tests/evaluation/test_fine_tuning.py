"""Answers after an inner step: at θ' of every group, in factors or in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from gdprompt_fast.data import Example
from gdprompt_fast.data.people import people_tokenizer
from gdprompt_fast.evaluation import (
    InnerStep,
    evaluate,
)
from gdprompt_fast.evaluation.adapted import adapted_one_after_another
from gdprompt_fast.teacher import greedy_answers
from helpers.scoring import (
    INNER,
    SpelledIds,
    gpt2,
    llama,
    score_one,
    scores_in,
)


def dense_inner_steps(
    model: torch.nn.Module, steps_on: Sequence[Sequence[Sequence[int]]], lr: float
) -> torch.nn.Module:
    """A model of its own after θ ← θ − η ∇(mean of the losses), for each list of contexts."""
    adapted = copy.deepcopy(model)
    for contexts in steps_on:
        losses = []
        for context in contexts:
            ids = torch.tensor([list(context)])
            logits = adapted(input_ids=ids, use_cache=False).logits[0, :-1]
            losses.append(F.cross_entropy(logits, ids[0, 1:]))
        torch.stack(losses).mean().backward()
        with torch.no_grad():
            for parameter in adapted.parameters():
                parameter -= lr * parameter.grad
                parameter.grad = None
    return adapted


@pytest.mark.parametrize(
    ("contexts", "one_after_another", "steps"),
    [(1, False, 1), (3, False, 1), (3, False, 2), (1, True, 1), (3, True, 1), (3, True, 2)],
)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_fine_tuning_scores_and_answers_at_the_adapted_weights_of_the_group(
    build: Callable[[], torch.nn.Module],
    contexts: int,
    one_after_another: bool,
    steps: int,
    examples: list[Example],
) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    tokenizer = SpelledIds()
    scores = scores_in(
        "fine_tuning",
        model,
        examples,
        InnerStep(lr=0.2, steps=steps),
        batch_size=6,
        tokenizer=tokenizer,
        answer_tokens=4,
        contexts_per_group=contexts,
        one_after_another=one_after_another,
    )
    for index, example in enumerate(examples[: len(scores)]):
        first = index // contexts * contexts
        group = [e.context for e in examples[first : first + contexts]]
        steps_on = [[context] for context in group] if one_after_another else [group]
        each = [step for step in steps_on for _ in range(steps)]
        adapted = dense_inner_steps(model, each, lr=0.2)
        expected, _ = score_one(adapted, example.query, example.response)
        assert float(scores.nll[index]) == pytest.approx(expected, rel=1e-4)
        answers = greedy_answers(adapted, [list(example.query)], eos=2, max_tokens=4)
        assert scores.answers and scores.answers[index] == " ".join(map(str, answers[0]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_context_after_another_is_the_ordinary_step_where_there_is_one(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    ordinary = scores_in("fine_tuning", model, examples)
    in_turn = scores_in("fine_tuning", model, examples, one_after_another=True)
    torch.testing.assert_close(in_turn.nll, ordinary.nll, rtol=1e-4, atol=1e-4)
    assert in_turn.predictions == ordinary.predictions


def test_adapters_are_stepped_in_place_and_put_back(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is an optional dependency")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    model = peft.get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.3)
    before = copy.deepcopy(model.state_dict())
    trained = [parameter.requires_grad for parameter in model.parameters()]
    for params in ("lora", "full"):
        inner = InnerStep(lr=0.2, params=params)
        ordinary = scores_in("fine_tuning", model, examples, inner)
        in_turn = scores_in("fine_tuning", model, examples, inner, one_after_another=True)
        torch.testing.assert_close(in_turn.nll, ordinary.nll, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_the_weights_come_back_after_an_error(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    before = copy.deepcopy(model.state_dict())
    model.requires_grad_(False)
    with pytest.raises(KeyError), adapted_one_after_another(model, examples[:2], INNER):
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_diverges_one_context_after_another_is_wrong_and_comes_back(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    before = copy.deepcopy(model.state_dict())
    scores = evaluate(
        model,
        people_tokenizer(),
        examples[:3],
        InnerStep(lr=1e38),
        batch_size=3,
        settings=("fine_tuning",),
        answer_tokens=4,
        contexts_per_group=3,
        one_after_another=True,
    )["fine_tuning"]
    assert scores.nll.isnan().all() and not scores.correct.any()
    assert scores.exact_match is not None and not scores.exact_match.any()
    assert scores.summary().nll_per_token is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_inner_rate_of_zero_leaves_fine_tuning_at_no_context(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    tokenizer = people_tokenizer()
    scores = evaluate(model, tokenizer, examples, InnerStep(lr=0.0), batch_size=3)
    torch.testing.assert_close(scores["fine_tuning"].nll, scores["no_context"].nll)
    assert not torch.allclose(scores["prompt"].nll, scores["no_context"].nll)
