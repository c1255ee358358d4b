"""Passages that the bundled models can read, about people that they never saw."""

from __future__ import annotations

from typing import NamedTuple

from ..data import make_people_data

SEED, COUNT = 16, 5


class Sample(NamedTuple):
    """A passage and a question that it answers."""

    passage: str
    question: str


def unseen_samples() -> list[Sample]:
    """Samples of the test set that the demo measures on is made of, always the same."""
    test = make_people_data(1, COUNT, SEED).test
    return [Sample(triple["context"], triple["query"]) for triple in test]
