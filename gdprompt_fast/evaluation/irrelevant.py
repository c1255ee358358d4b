"""The control of irrelevant contexts: the same queries with contexts that are not theirs."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from datasets import Dataset

from ..errors import UserError


def with_irrelevant_contexts(records: Dataset, seed: int) -> Dataset:
    """Triples in which every query has the context of another: a seeded permutation of the
    contexts that leaves no query one with the text of its own.

    It works on texts, not on tokens, because context ⊕ query has to be tokenised as one text.
    Tokenised, a longer context may take a record over the limits that it was within before.

    Raises:
        ValueError: if more than half of the records have the same context.
    """
    contexts = list(records["context"])
    sources = _derangement(contexts, seed)
    moved = [name for name in ("context", "context_loss") if name in records.column_names]
    return Dataset.from_list(
        [
            {**record, **{name: records[source][name] for name in moved}}
            for record, source in zip(records, sources, strict=True)
        ]
    )


def _derangement(contexts: Sequence[str], seed: int) -> list[int]:
    """For every index another one whose context differs.

    Records of the same context stand side by side in a random order; every one takes the context
    that lies as many places further on as the largest such block is long, and so never its own.
    """
    blocks: dict[str, list[int]] = defaultdict(list)
    for index, context in enumerate(contexts):
        blocks[context].append(index)
    longest = max(map(len, blocks.values()))
    if 2 * longest > len(contexts):
        raise UserError(
            "records: expected no context in more than half of them, "
            f"got one in {longest} of {len(contexts)}"
        )
    shuffled = list(blocks.values())
    random.Random(seed).shuffle(shuffled)
    order = [index for block in shuffled for index in block]
    sources = [0] * len(contexts)
    for place, index in enumerate(order):
        sources[index] = order[(place + longest) % len(order)]
    return sources
