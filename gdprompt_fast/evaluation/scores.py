"""NLL and accuracy of gold responses and of generated answers, and their means with errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Rows
from ..meta.gathered import gathered
from .answers import exact_match, f1


@dataclass(frozen=True)
class Summary:
    """Means over a set of examples, with standard errors (``_se``).

    What is not a finite number is None, so that a summary is JSON: the standard error of a single
    example, an NLL at an inner rate that is far too large, the scores of answers not generated.

    Attributes:
        accuracy: the share of examples whose greedy answer is the gold response, EOS included.
        token_accuracy: the mean over examples of the share of the gold response's tokens, EOS
            included, that are the most likely ones after the gold tokens before them.
        nll_per_token: −log p of the gold responses, over all their tokens.
        nll_per_example: −log p of a gold response, summed over its tokens.
        exact_match: the share of examples whose generated answer is a gold one, as SQuAD counts.
        f1: the mean over examples of the F1 of the generated answer's words, as SQuAD counts.
    """

    examples: int
    tokens: int
    accuracy: float
    accuracy_se: float | None
    token_accuracy: float
    token_accuracy_se: float | None
    nll_per_token: float | None
    nll_per_token_se: float | None
    nll_per_example: float | None
    nll_per_example_se: float | None
    exact_match: float | None = None
    exact_match_se: float | None = None
    f1: float | None = None
    f1_se: float | None = None


@dataclass(frozen=True)
class Scores:
    """What a model says of N gold responses, and what it answers itself.

    Attributes:
        nll: −log p of each response, summed over its tokens, [N].
        tokens: the number of tokens of each response, [N].
        correct: whether every token of the response was the most likely one, [N]. That is so
            exactly when greedy decoding gives the response: both go the same way up to the first
            token that is not the most likely one, and there both are wrong.
        token_accuracy: the share of each response's tokens that were the most likely ones, [N].
        predictions: the most likely token at every position of each response.
        answers: the greedy answer that was generated, as text; None if none were asked for.
        exact_match: whether the answer is a gold one after SQuAD's normalisation, [N]; None
            without answers.
        f1: the F1 of the answer's words, [N]; None without answers.
    """

    nll: Tensor
    tokens: Tensor
    correct: Tensor
    token_accuracy: Tensor
    predictions: list[list[int]]
    answers: list[str] | None = None
    exact_match: Tensor | None = None
    f1: Tensor | None = None

    def __len__(self) -> int:
        return len(self.nll)

    @staticmethod
    def concatenate(parts: Sequence[Scores]) -> Scores:
        """The scores of several batches as one."""
        names = [field.name for field in fields(Scores)]
        return Scores(**{name: _joined([getattr(part, name) for part in parts]) for name in names})

    def reordered(self, order: Sequence[int]) -> Scores:
        """The scores ``order[0]``, ``order[1]``, … of these."""

        def reorder(values: Any) -> Any:
            if values is None:
                return None
            is_tensor = isinstance(values, Tensor)
            return values[list(order)] if is_tensor else [values[index] for index in order]

        return Scores(**{each.name: reorder(getattr(self, each.name)) for each in fields(Scores)})

    def with_answers(self, answers: Sequence[str], golds: Sequence[Sequence[str]]) -> Scores:
        """The same with generated answers, each compared with all of its gold answers."""
        pairs = list(zip(answers, golds, strict=True))
        return replace(
            self,
            answers=list(answers),
            exact_match=torch.tensor([exact_match(answer, gold) for answer, gold in pairs]),
            f1=torch.tensor([f1(answer, gold) for answer, gold in pairs]),
        )

    def summary(self) -> Summary:
        """Means and standard errors; per token it is that of a ratio of two means."""
        nll, tokens = self.nll.double(), self.tokens.double()
        per_token = nll.sum() / tokens.sum()
        return Summary(
            examples=len(self),
            tokens=int(tokens.sum()),
            accuracy=float(self.correct.double().mean()),
            accuracy_se=_standard_error(self.correct),
            token_accuracy=float(self.token_accuracy.double().mean()),
            token_accuracy_se=_standard_error(self.token_accuracy),
            nll_per_token=finite(per_token),
            nll_per_token_se=_standard_error((nll - per_token * tokens) / tokens.mean()),
            nll_per_example=finite(nll.mean()),
            nll_per_example_se=_standard_error(nll),
            exact_match=_mean(self.exact_match),
            exact_match_se=_standard_error(self.exact_match),
            f1=_mean(self.f1),
            f1_se=_standard_error(self.f1),
        )


def finite(value: Tensor | float) -> float | None:
    """``value`` as JSON can have it: None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def _joined(parts: list[Any]) -> Any:
    """Tensors concatenated, lists chained, None for parts that are None."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return [item for part in parts for item in part]


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else finite(values.double().mean())


def _standard_error(values: Tensor | None) -> float | None:
    """Of the mean of ``values``: their standard deviation (over N − 1), over √N."""
    if values is None or len(values) < 2:
        return None
    return finite(values.double().std() / len(values) ** 0.5)


@torch.no_grad()
def score_rows(model: nn.Module, rows: Rows) -> Scores:
    """Scores the responses that end ``rows``, in one forward pass under the gold tokens.

    No attention mask is needed: attention is causal, so no real token sees the padding after it.
    """
    begin = int(rows.response_mask.long().argmax(1).min())  # no response begins before it
    keep = rows.ids.shape[1] - begin + 1
    with gathered(model):
        output = model(input_ids=rows.ids, use_cache=False, logits_to_keep=keep)
    logits = output.logits[:, :-1].float()
    gold, mask = rows.ids[:, begin:], rows.response_mask[:, begin:]
    nll = F.cross_entropy(logits.transpose(1, 2), gold, reduction="none")
    predicted = logits.argmax(-1)
    tokens, right = mask.sum(1), ((predicted == gold) & mask).sum(1)
    return Scores(
        nll=torch.where(mask, nll, 0).sum(1).cpu(),
        tokens=tokens.cpu(),
        correct=(right == tokens).cpu(),
        token_accuracy=(right / tokens).cpu(),
        predictions=[row[keep].tolist() for row, keep in zip(predicted, mask, strict=True)],
    )
