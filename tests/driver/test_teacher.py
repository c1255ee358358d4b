"""The teacher's greedy answers, and its predictions of them."""

from __future__ import annotations

import copy

import pytest
import torch

from gdprompt_fast.data import Limits, prompt_rows, tokenise_triples, with_responses
from gdprompt_fast.data.people import make_people_data, people_tokenizer
from gdprompt_fast.teacher import greedy_answers, teach
from helpers.models import gpt2, llama

VOCABULARY = len(people_tokenizer())


@pytest.fixture(params=["rotary positions", "learned positions"])
def teacher(request: pytest.FixtureRequest) -> torch.nn.Module:
    if request.param == "rotary positions":
        return llama(VOCABULARY)
    return gpt2(VOCABULARY, positions=64)


PROMPTS = [[5, 9, 23, 40, 7, 88], [61], [12, 80, 3, 33], [9, 9, 100, 20, 31, 64, 70, 15, 2]]


def slow_greedy(model: torch.nn.Module, prompt: list[int], eos: int, max_tokens: int) -> list[int]:
    """One prompt, no padding, no cache."""
    answer: list[int] = []
    while len(answer) < max_tokens and eos not in answer:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


def test_a_batch_of_prompts_is_answered_as_one_after_another(teacher: torch.nn.Module) -> None:
    endless = [slow_greedy(teacher, prompt, eos=-1, max_tokens=12) for prompt in PROMPTS]
    eos = endless[0][3]  # a token that some answers contain, so that they end there
    answers = greedy_answers(teacher, PROMPTS, eos, max_tokens=12)
    assert answers == [slow_greedy(teacher, prompt, eos, 12) for prompt in PROMPTS]
    assert answers[0][-1] == eos and answers[0].count(eos) == 1
    assert {len(answer) for answer in answers} != {12}


def test_an_answer_ends_at_the_limit(teacher: torch.nn.Module) -> None:
    answers = greedy_answers(teacher, PROMPTS, eos=-1, max_tokens=5)
    assert [len(answer) for answer in answers] == [5] * len(PROMPTS)


def test_decoding_ignores_sampling_and_penalties_of_the_generation_config(
    teacher: torch.nn.Module,
) -> None:
    plain = greedy_answers(teacher, PROMPTS, eos=-1, max_tokens=8)
    changed = copy.deepcopy(teacher)
    changed.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    assert greedy_answers(changed, PROMPTS, eos=-1, max_tokens=8) == plain


def test_targets_are_the_teachers_predictions_of_its_own_answers(teacher: torch.nn.Module) -> None:
    tokenizer = people_tokenizer()
    data = make_people_data(1, 5, seed=0).test
    examples = tokenise_triples(data, tokenizer, Limits(64, 64, 64)).examples
    answered, targets = teach(teacher, examples, tokenizer.eos_token_id, max_tokens=3)
    answers = greedy_answers(
        teacher, [list(e.prompt) for e in examples], tokenizer.eos_token_id, max_tokens=3
    )
    assert [list(example.response) for example in answered] == answers
    assert [e.prompt for e in answered] == [e.prompt for e in examples]
    rows = prompt_rows(with_responses(examples, answers))
    with torch.no_grad():
        logits = teacher(input_ids=rows.ids).logits[:, :-1][rows.response_mask[:, 1:]]
    torch.testing.assert_close(targets.materialised_logits(), logits)
    # What the teacher finds most likely at each response position is what it said.
    assert logits.argmax(-1).tolist() == [token for answer in answers for token in answer]
