"""What tests ask of triples."""

from __future__ import annotations

from gdprompt_fast.data import (
    TrainTest,
)


def unlike(data: TrainTest) -> bool:
    """Whether no context of the training set is in the test set."""
    return not {*data.train["context"]} & {*data.test["context"]}
