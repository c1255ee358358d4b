"""How probable a model holds each token of given rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data import pad

ALTERNATIVES = 3
WHITE_SPACE = str.maketrans(" \n\r\t", "␣↵↵⇥")


class Place(NamedTuple):
    """What a model holds of one token of a row.

    Attributes:
        probability: of the token, after the tokens before it.
        likeliest: the ``ALTERNATIVES`` most probable tokens there, with their probabilities.
    """

    probability: float
    likeliest: tuple[tuple[int, float], ...]


@torch.no_grad()
def probabilities(
    model: nn.Module, starts: Sequence[Sequence[int]], ends: Sequence[Sequence[int]]
) -> list[list[Place]]:
    """The places of every row's end after its start, in one forward pass of start ⊕ end.

    Args:
        starts, ends: token ids, none empty.
    """
    ids, _ = pad([[*start, *end] for start, end in zip(starts, ends, strict=True)])
    ids = ids.to(next(model.parameters()).device)
    begin = min(map(len, starts))  # no end begins before it
    keep = ids.shape[1] - begin + 1
    output: Any = model(input_ids=ids, use_cache=False, logits_to_keep=keep)
    shares = output.logits[:, :-1].float().softmax(-1)
    of_tokens = shares.gather(-1, ids[:, begin:, None])[..., 0].tolist()
    best = shares.topk(min(ALTERNATIVES, shares.shape[-1]))
    values, tokens = best.values.tolist(), best.indices.tolist()
    return [
        [
            Place(of_tokens[row][at], tuple(zip(tokens[row][at], values[row][at], strict=True)))
            for at in range(len(start) - begin, len(start) - begin + len(end))
        ]
        for row, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text, white space by signs; in the vocabulary's own letters where it is no text
    by itself.
    """
    text = str(tokenizer.decode([token]))
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return str(tokenizer.convert_ids_to_tokens(token))
    return text.strip() or text.translate(WHITE_SPACE)
