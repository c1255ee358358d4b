"""Batches of about equal lengths: what they pad, whom they repeat, where they continue."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from gdprompt_fast.data import LengthSampler, ShuffledSampler, Size, by_length
from gdprompt_fast.data.lengths import cut
from gdprompt_fast.layout import rung

# Percentiles of the tokens in SQuAD's contexts of at most 256, and in its questions with an answer.
PERCENTILES = [0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100]
CONTEXTS = [36, 43, 77, 103, 119, 129, 140, 150, 164, 180, 197, 218, 233, 252, 256]
QUERIES = [7, 10, 12, 13, 15, 16, 17, 19, 20, 22, 24, 27, 30, 38, 55]
BATCH = 16


def draw(rng: random.Random, tokens: list[int]) -> int:
    at = rng.uniform(0, 100)
    above = next(place for place, percentile in enumerate(PERCENTILES) if percentile >= at)
    low, high = PERCENTILES[above - 1 : above + 1]
    share = (at - low) / (high - low)
    return round(tokens[above - 1] + share * (tokens[above] - tokens[above - 1]))


@pytest.fixture(scope="module")
def sizes() -> list[Size]:
    """Four thousand passages with five questions each."""
    rng = random.Random(0)
    passages = [(draw(rng, CONTEXTS), str(n).encode()) for n in range(4000)]
    return [
        Size(tokens, draw(rng, QUERIES), frozenset([name]))
        for tokens, name in passages
        for _ in range(5)
    ]


def batches_of(sampler: LengthSampler | ShuffledSampler, size: int) -> list[list[int]]:
    """The batches of an epoch."""
    return [sampler.take(BATCH) for _ in range(-(-size // BATCH))]


def padding(batches: list[list[int]], sizes: list[Size], ladder: bool) -> float:
    computed = tokens = 0
    for batch in batches:
        for name in ("long", "short"):
            lengths = [getattr(sizes[index], name) for index in batch]
            width = rung(max(lengths)) if ladder else max(lengths)
            computed += width * len(batch)
            tokens += sum(lengths)
    return 1 - tokens / computed


def test_at_most_eight_percent_are_padding_the_ladder_included(sizes: list[Size]) -> None:
    assert 145 < sum(size.long for size in sizes) / len(sizes) < 160
    grouped = batches_of(LengthSampler(sizes, 0, BATCH), len(sizes))
    shuffled = batches_of(ShuffledSampler(len(sizes), 0), len(sizes))
    assert padding(shuffled, sizes, ladder=True) > 0.3
    assert padding(grouped, sizes, ladder=True) <= 0.08
    assert padding(grouped, sizes, ladder=False) <= 0.08


@pytest.mark.parametrize("group", [1, 4])
def test_an_epoch_has_every_index_once_and_no_passage_twice_in_a_batch(
    group: int, sizes: list[Size]
) -> None:
    batches = batches_of(LengthSampler(sizes, 0, BATCH, group), len(sizes))
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    for batch in batches:
        assert len(frozenset().union(*(sizes[index].passages for index in batch))) == BATCH
    assert batches != batches_of(LengthSampler(sizes, 1, BATCH, group), len(sizes))


def test_lengths_come_in_random_order_and_groups_are_random(sizes: list[Size]) -> None:
    longest = [
        max(sizes[index].long for index in batch)
        for batch in batches_of(LengthSampler(sizes, 0, BATCH), len(sizes))
    ]
    rising = sum(b > a for a, b in pairwise(longest)) / len(longest)
    assert 0.35 < rising < 0.65
    spreads = {}
    for group in (1, 4):
        of_groups = []
        for batch in batches_of(LengthSampler(sizes, 0, BATCH, group), len(sizes)):
            for start in range(0, BATCH, 4):
                lengths = [sizes[index].long for index in batch[start : start + 4]]
                of_groups.append(max(lengths) - min(lengths))
        spreads[group] = sum(of_groups) / len(of_groups)
    by_chance = random.Random(0)
    chance = []
    for _ in range(2000):
        lengths = [size.long for size in by_chance.sample(sizes, 4)]
        chance.append(max(lengths) - min(lengths))
    assert spreads[4] == pytest.approx(sum(chance) / len(chance), rel=0.05)
    assert spreads[1] < 0.2 * spreads[4]


@pytest.mark.parametrize(("size", "batch", "group"), [(1000, 16, 1), (7, 2, 1), (5, 8, 4)])
def test_a_sampler_continues_from_its_position(size: int, batch: int, group: int) -> None:
    rng = random.Random(0)
    sizes = [Size(rng.randint(2, 99), rng.randint(2, 9)) for _ in range(size)]
    whole = LengthSampler(sizes, 3, batch, group)
    drawn = [whole.take(batch) for _ in range(150)]
    for done in (1, 31, 63, 149):
        resumed = LengthSampler(sizes, 3, batch, group, position=done * batch)
        assert [resumed.take(batch) for _ in range(150 - done)] == drawn[done:]
    counts = Counter(index for batch_drawn in drawn for index in batch_drawn)
    assert max(counts.values()) - min(counts.get(index, 0) for index in range(size)) <= 2


def test_a_passage_is_in_a_list_twice_only_where_it_has_to_be() -> None:
    of = {"a": 3, "b": 2, "c": 1}
    names = [name for name, count in of.items() for _ in range(count)]
    sizes = [Size(9, 9, frozenset([name.encode()])) for name in names]
    for seed in range(50):
        order = list(range(6))
        random.Random(seed).shuffle(order)
        lists = cut(order, sizes, 2)
        assert sorted(index for chosen in lists for index in chosen) == list(range(6))
        assert all(len({names[index] for index in chosen}) == 2 for chosen in lists)
    alike = [Size(9, 9, frozenset([b"a"]))] * 4
    assert sorted(index for chosen in cut(range(4), alike, 2) for index in chosen) == [0, 1, 2, 3]


def test_neighbours_have_about_equal_lengths() -> None:
    sizes = [Size(30, 5), Size(3, 9), Size(29, 2), Size(3, 1), Size(64, 4)]
    assert by_length(sizes) == [3, 1, 0, 2, 4]


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="count: expected a batch of 2, got 3"):
        LengthSampler([Size(2, 2)] * 9, 0, batch=2).take(3)
