"""What a model answers: greedy, without examples in the prompt, and whether that is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..evaluation.answers import decode, exact_match
from .material.subsets import Question
from .train import padding_of


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    batch_size: int,
    bf16: bool = False,
) -> list[str]:
    """The greedy continuation of every prompt, without special tokens, stripped; a batch of like
    lengths is padded on the left.
    """
    device: torch.device = next(model.parameters()).device
    rows: list[list[int]] = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    pad, said = padding_of(tokenizer), [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(rows[chosen[-1]])
        ids = torch.full((len(chosen), longest), pad)
        for row, index in enumerate(chosen):
            ids[row, longest - len(rows[index]) :] = torch.tensor(rows[index])
        sizes = torch.tensor([len(rows[index]) for index in chosen])[:, None]
        mask = torch.arange(longest) >= longest - sizes
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.long().to(device),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=pad,
            )
        for index, tokens in zip(chosen, out[:, longest:].tolist(), strict=True):
            said[index] = decode(tokenizer, tokens)
    return said


def scored(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tests: Mapping[str, Sequence[Question]],
    new_tokens: int,
    batch_size: int,
    most: int | None = None,
    bf16: bool = False,
) -> dict[str, str]:
    """By test set, a character for every question: 1 where the answer is right by SQuAD's exact
    match, else 0.

    Args:
        most: questions of a set, the first ones; None: all.
    """
    chosen = {name: list(questions)[:most] for name, questions in tests.items() if questions}
    prompts = [question.prompt for questions in chosen.values() for question in questions]
    said = iter(answers(model, tokenizer, prompts, new_tokens, batch_size, bf16))
    return {
        name: "".join("01"[exact_match(next(said), each.answers)] for each in questions)
        for name, questions in chosen.items()
    }
