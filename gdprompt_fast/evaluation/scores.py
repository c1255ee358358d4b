"""NLL and accuracy of gold responses, example by example, and their means with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Rows


@dataclass(frozen=True)
class Summary:
    """Means over a set of examples, with standard errors (NaN for a single example).

    Attributes:
        accuracy: the share of examples whose greedy answer is the gold response, EOS included.
        nll_per_token: −log p of the gold responses, over all their tokens.
        nll_per_example: −log p of a gold response, summed over its tokens.
    """

    examples: int
    tokens: int
    accuracy: float
    accuracy_se: float
    nll_per_token: float
    nll_per_token_se: float
    nll_per_example: float
    nll_per_example_se: float


@dataclass(frozen=True)
class Scores:
    """What a model says of N gold responses.

    Attributes:
        nll: −log p of each response, summed over its tokens, [N].
        tokens: the number of tokens of each response, [N].
        correct: whether every token of the response was the most likely one, [N]. That is so
            exactly when greedy decoding gives the response: both go the same way up to the first
            token that is not the most likely one, and there both are wrong.
        predictions: the most likely token at every position of each response.
    """

    nll: Tensor
    tokens: Tensor
    correct: Tensor
    predictions: list[list[int]]

    @staticmethod
    def concatenate(parts: Sequence[Scores]) -> Scores:
        """The scores of several batches as one."""
        return Scores(
            nll=torch.cat([part.nll for part in parts]),
            tokens=torch.cat([part.tokens for part in parts]),
            correct=torch.cat([part.correct for part in parts]),
            predictions=[prediction for part in parts for prediction in part.predictions],
        )

    def summary(self) -> Summary:
        """Means and standard errors; per token it is that of a ratio of two means."""
        nll, tokens = self.nll.double(), self.tokens.double()
        correct = self.correct.double()
        per_token = nll.sum() / tokens.sum()
        return Summary(
            examples=len(nll),
            tokens=int(tokens.sum()),
            accuracy=float(correct.mean()),
            accuracy_se=_standard_error(correct),
            nll_per_token=float(per_token),
            nll_per_token_se=_standard_error((nll - per_token * tokens) / tokens.mean()),
            nll_per_example=float(nll.mean()),
            nll_per_example_se=_standard_error(nll),
        )


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")


@torch.no_grad()
def score_rows(model: nn.Module, rows: Rows) -> Scores:
    """Scores the responses that end ``rows``, in one forward pass under the gold tokens.

    No attention mask is needed: attention is causal, so no real token sees the padding after it.
    """
    begin = int(rows.response_mask.long().argmax(1).min())  # no response begins before it
    keep = rows.ids.shape[1] - begin + 1
    logits = model(input_ids=rows.ids, use_cache=False, logits_to_keep=keep).logits[:, :-1].float()
    gold, mask = rows.ids[:, begin:], rows.response_mask[:, begin:]
    nll = F.cross_entropy(logits.transpose(1, 2), gold, reduction="none")
    predicted = logits.argmax(-1)
    return Scores(
        nll=torch.where(mask, nll, 0).sum(1).cpu(),
        tokens=mask.sum(1).cpu(),
        correct=((predicted == gold) | ~mask).all(1).cpu(),
        predictions=[row[keep].tolist() for row, keep in zip(predicted, mask, strict=True)],
    )
