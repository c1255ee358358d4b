"""Greedy decoding of many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def greedy_answers(
    model: nn.Module, prompts: Sequence[Sequence[int]], eos: int, max_tokens: int
) -> list[list[int]]:
    """The model's most likely next tokens after each prompt, up to and with EOS.

    Plain arg max at every step, whatever sampling or penalties the model's generation config asks
    for. An answer that reaches ``max_tokens`` ends there, without EOS; none is empty.
    """
    device = next(model.parameters()).device
    ids, mask = (tensor.to(device) for tensor in left_pad(prompts))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    answers = torch.empty(len(prompts), 0, dtype=torch.long, device=device)
    kept: dict[str, Any] = {}
    for _ in range(max_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **kept,
        )
        name = "cache" if "cache" in output else "past_key_values"  # its older name
        ids, kept = output.logits.argmax(-1), {name: output[name]}
        answers = torch.cat([answers, ids], dim=1)
        if (answers == eos).any(1).all():
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
    return [_through(row, eos) for row in answers.tolist()]


def left_pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Left-padded ids [B, T] and their attention mask [B, T], int64: all rows end together."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, length - len(row) :] = 1
    return ids, mask


def _through(answer: list[int], eos: int) -> list[int]:
    return answer[: answer.index(eos) + 1] if eos in answer else answer
