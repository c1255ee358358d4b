"""Scores of small models on questions about people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from gdprompt_fast.data import Example, with_responses
from gdprompt_fast.data.people import people_tokenizer
from gdprompt_fast.evaluation import (
    InnerStep,
    Scores,
    evaluate,
)
from gdprompt_fast.teacher import greedy_answers
from helpers import models

VOCABULARY = len(people_tokenizer())
INNER = InnerStep(lr=0.5)


def llama(tied: bool = True) -> torch.nn.Module:
    return models.llama(VOCABULARY, tie_word_embeddings=tied)


def gpt2() -> torch.nn.Module:
    return models.gpt2(VOCABULARY, positions=64)


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


def ending_in_some(model: torch.nn.Module, examples: Sequence[Example]) -> int:
    """A token for EOS that some greedy answers to the prompts contain and others do not."""
    answers = greedy_answers(model, [example.prompt for example in examples], -1, max_tokens=12)
    return answers[0][3]


def ending_with(end: int, examples: Sequence[Example]) -> list[Example]:
    """The same examples with another token that ends their responses."""
    return with_responses(examples, [[*example.response[:-1], end] for example in examples])


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
