"""Rows of tokens: demonstrations in the prompt, or as texts to fine-tune on, and the query.

in-context   BOS, (input, answer, EOS) for every demonstration that fits, query, candidate
zero-shot    BOS, query, candidate; fine-tuned models read the same
a text       BOS, input, answer: what one step of fine-tuning is on, without EOS
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .tasks import TASKS, Item, shuffled

PERMUTATIONS = 5  # drawn for a seed; number 0 is the order as drawn


@dataclass(frozen=True)
class Prompts:
    """A task in tokens.

    Attributes:
        texts: of all demonstrations, in their order: BOS, input, answer.
        context: BOS and the demonstrations that fit, each with EOS.
        spans: where in ``context`` the input and answer of each of these stand.
        queries: of the evaluation set, without BOS.
        gold: the label of each query.
        options: the token of every answer.
        bos: the token that opens a row.
    """

    texts: list[list[int]]
    context: list[int]
    spans: list[tuple[int, int]]
    queries: list[list[int]]
    gold: list[int]
    options: list[int]
    bos: int

    @property
    def fingerprint(self) -> str:
        """A short name of all but the queries."""
        content = [self.texts, self.context, self.spans, self.options, self.bos]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def demonstrations(items: Sequence[Item], count: int, seed: int, permutation: int) -> list[Item]:
    """The first of the items shuffled, in the order of a permutation.

    Args:
        permutation: 0 for the order as drawn, else which of ``PERMUTATIONS`` of
            ``np.random.permutation`` after ``np.random.seed(seed)``.

    Raises:
        UserError: if there are too few items.
    """
    if len(items) < count:
        raise UserError(
            f"demonstrations: expected at most {len(items)}, all there are, got {count}"
        )
    drawn = shuffled(items, seed)[:count]
    if permutation == 0:
        return drawn
    generator = np.random.RandomState(seed)
    orders = [generator.permutation(count) for _ in range(PERMUTATIONS)]
    return [drawn[index] for index in orders[permutation - 1]]


def make_prompts(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    demos: Sequence[Item],
    queries: Sequence[Item],
    window: int,
    bos: str | None = None,
    eos: str | None = None,
) -> Prompts:
    """The rows of a task's demonstrations and queries.

    Demonstrations are put into the context from the first on, while context, the next one and the
    longest query with its candidate together are shorter than ``window``.

    Args:
        name: of the task.
        bos, eos: tokens; None: the tokenizer's own.

    Raises:
        UserError: if there is no such token, an answer is not one token, two are the same, or not
            one demonstration fits.
    """
    options = _options(tokenizer, TASKS[name].options)
    begin = _special(tokenizer, "bos", bos)
    end = _special(tokenizer, "eos", eos)
    answered = [[*_encode(tokenizer, item.text), options[item.label]] for item in demos]
    asked = [_encode(tokenizer, item.text) for item in queries]
    room = window - max(map(len, asked)) - 1
    context, spans = [begin], list[tuple[int, int]]()
    for tokens in answered:
        if len(context) + len(tokens) + 1 >= room:
            break
        spans.append((len(context), len(context) + len(tokens)))
        context += [*tokens, end]
    if not spans:
        raise UserError(
            f"window: expected room for a demonstration and the longest query of {name}, "
            f"{window - room - 1} tokens, got {window} tokens"
        )
    texts = [[begin, *tokens] for tokens in answered]
    gold = [item.label for item in queries]
    return Prompts(texts, context, spans, asked, gold, options, begin)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _options(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[int]:
    """The token of every answer after its space.

    What is recorded is at *the* token of a candidate, and predictions are compared without regard
    to lengths; with several tokens both would mean something else.
    """
    options = []
    for answer in answers:
        tokens = _encode(tokenizer, f" {answer}")
        if len(tokens) != 1:
            raise UserError(
                f"options: expected each to be one token of the tokenizer, got {len(tokens)} for "
                f"{answer!r}"
            )
        options += tokens
    if len(set(options)) < len(options):
        raise UserError(
            f"options: expected different tokens for {', '.join(answers)}, got the same"
        )
    return options


def _special(tokenizer: PreTrainedTokenizerBase, role: str, token: str | None) -> int:
    text = getattr(tokenizer, f"{role}_token") if token is None else token
    if text is None:
        raise UserError(f"{role}: expected a token, since the tokenizer has none, got none")
    known = tokenizer.get_vocab()
    if text not in known:
        raise UserError(f"{role}: expected a token of the tokenizer, got {text!r}")
    return int(known[text])
