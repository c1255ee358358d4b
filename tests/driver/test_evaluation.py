"""No Context, Prompt and Fine-Tuning: scores, generated answers, groups, and the tuned baseline."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from gdprompt_fast.data import Example, Limits, query_rows, tokenise_triples, with_responses
from gdprompt_fast.data.people import make_people_data, people_tokenizer
from gdprompt_fast.evaluation import (
    SETTINGS,
    InnerStep,
    Scores,
    evaluate,
    read_predictions,
    score_rows,
    tune_inner_lr,
    with_irrelevant_contexts,
    write_predictions,
)
from gdprompt_fast.evaluation.adapted import adapted_one_after_another
from gdprompt_fast.teacher import greedy_answers
from helpers import models

VOCABULARY = len(people_tokenizer())
INNER = InnerStep(lr=0.5)


def llama(tied: bool = True) -> torch.nn.Module:
    return models.llama(VOCABULARY, tie_word_embeddings=tied)


def gpt2() -> torch.nn.Module:
    return models.gpt2(VOCABULARY, positions=64)


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


class SpelledIds:
    """Stands for a tokenizer: its text of tokens is their ids, special ones too."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def scores_in(
    setting: str,
    model: torch.nn.Module,
    examples: Sequence[Example],
    inner: InnerStep = INNER,
    batch_size: int = 3,
    tokenizer: Any = None,
    **options: Any,
) -> Scores:
    """The scores in one setting, by default without generated answers."""
    options = {"answer_tokens": 0, **options}
    tokenizer = tokenizer or people_tokenizer()
    one = evaluate(model, tokenizer, examples, inner, batch_size, settings=[setting], **options)
    assert list(one) == [setting]
    return one[setting]


def score_one(
    model: torch.nn.Module, start: Sequence[int], response: Sequence[int]
) -> tuple[float, float]:
    """The NLL of one response and the share of its tokens that are the most likely."""
    with torch.no_grad():
        ids = torch.tensor([[*start, *response]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(start) - 1 : -1]
    gold = torch.tensor(list(response))
    nll = F.cross_entropy(logits, gold, reduction="sum")
    return float(nll), float((logits.argmax(-1) == gold).float().mean())


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


def ending_in_some(model: torch.nn.Module, examples: Sequence[Example]) -> int:
    """A token for EOS that some greedy answers to the prompts contain and others do not."""
    answers = greedy_answers(model, [example.prompt for example in examples], -1, max_tokens=12)
    return answers[0][3]


def ending_with(end: int, examples: Sequence[Example]) -> list[Example]:
    """The same examples with another token that ends their responses."""
    return with_responses(examples, [[*example.response[:-1], end] for example in examples])


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
