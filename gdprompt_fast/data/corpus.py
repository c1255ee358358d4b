"""What is made of a body of texts: triples in groups, divided into training and test set."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from ..errors import UserError

Record = dict[str, Any]

TEST_SHARE = 0.1  # of the records, where nothing else is asked for


@dataclass(frozen=True)
class Corpus:
    """Triples of a body of texts.

    Attributes:
        groups: lists of triples that speak of the same, such as an article's; a group is never
            divided between training and test set.
        dropped: by reason, the records that could not be used.
    """

    groups: list[list[Record]]
    dropped: dict[str, list[Record]]

    @property
    def counts(self) -> dict[str, int]:
        """By reason, how many records could not be used."""
        return {why: len(records) for why, records in self.dropped.items()}

    def records(self) -> list[Record]:
        """The triples of all groups, in their order."""
        return [record for group in self.groups for record in group]

    def without(self, unwanted: Callable[[Record], bool], why: str) -> Corpus:
        """The triples that are not ``unwanted``; the others are dropped for ``why``."""
        groups = [[record for record in group if not unwanted(record)] for group in self.groups]
        lost = [record for record in self.records() if unwanted(record)]
        dropped = {**self.dropped, why: self.dropped.get(why, []) + lost} if lost else self.dropped
        return Corpus([group for group in groups if group], dropped)

    def split(self, test_size: int | None, seed: int) -> tuple[Corpus, Corpus]:
        """Training and test part, by whole groups in a seeded draw.

        The test part gets groups until it has ``test_size`` records, or a tenth of all. What was
        dropped is said of the training part.

        Raises:
            ValueError: if that leaves nothing to train on.
        """
        total = sum(map(len, self.groups))
        wanted = max(1, round(total * TEST_SHARE)) if test_size is None else test_size
        drawn: set[int] = set()
        size = 0
        for index in random.Random(seed).sample(range(len(self.groups)), len(self.groups)):
            if size >= wanted:
                break
            drawn.add(index)
            size += len(self.groups[index])
        if len(drawn) == len(self.groups):
            raise UserError(
                f"test: expected to leave records to train on, got {wanted} of {total} records in "
                f"{len(self.groups)} groups that stay together"
            )
        train = [group for index, group in enumerate(self.groups) if index not in drawn]
        test = [group for index, group in enumerate(self.groups) if index in drawn]
        return Corpus(train, self.dropped), Corpus(test, {})


def load_hub(path: str, name: str | None, split: str) -> Dataset:
    """A split of a data set on the Hugging Face hub, or of its copy in the cache.

    Raises:
        ValueError: naming ``--source``, if the hub cannot be reached or does not have it.
    """
    try:
        return load_dataset(path, name, split=split)
    except (OSError, DatasetsError) as error:
        raise UserError(
            f"{path}: expected to load it from the Hugging Face hub, got: {error}; "
            "--source takes a file instead"
        ) from error
