"""The held-out curve: what a training is measured on as it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data import Example
from .adapted import InnerStep
from .settings import SETTINGS, evaluate

HELD_OUT = "held_out"
MERIT = f"{HELD_OUT}/fine_tuning/nll"  # what the best model has the lowest of


@dataclass(frozen=True)
class HeldOut:
    """What a training is measured on as it goes.

    Attributes:
        examples: a sample, none of which is trained on.
        every: outer steps between two measurements; the last step has one too.
        batch_size: examples evaluated at once.
    """

    examples: Sequence[Example]
    every: int
    batch_size: int

    def is_due(self, step: int, steps: int) -> bool:
        """Whether it is time, after so many of all steps."""
        return step % self.every == 0 or step == steps

    def numbers(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, inner: InnerStep
    ) -> dict[str, float]:
        """NLL per token, accuracy and token accuracy of the gold responses in the three settings,
        by the names that metrics have; without those that are no finite number.
        """
        scores = evaluate(
            model,
            tokenizer,
            self.examples,
            inner,
            self.batch_size,
            answer_tokens=0,
            group_by_length=True,
        )
        found: dict[str, float] = {}
        for setting, of in scores.items():
            summary = of.summary()
            named = {
                "nll": summary.nll_per_token,
                "accuracy": summary.accuracy,
                "token_accuracy": summary.token_accuracy,
            }
            numbers = {name: value for name, value in named.items() if value is not None}
            found |= {f"{HELD_OUT}/{setting}/{name}": value for name, value in numbers.items()}
        return found


def held_out_curves(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """The held-out NLL by step, by setting; empty where none was measured."""
    curves = {
        setting: {int(row["step"]): row[name] for row in rows if name in row}
        for setting, name in ((setting, f"{HELD_OUT}/{setting}/nll") for setting in SETTINGS)
    }
    return {setting: curve for setting, curve in curves.items() if curve}
