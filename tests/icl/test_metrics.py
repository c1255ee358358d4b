"""Similarities and shares against plain loops, the recipe's counts and what must hold of any."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gdprompt_fast.icl.metrics import (
    Answers,
    Observed,
    Ratio,
    kendall_tau,
    ratio_cell,
    recall_of_top,
    sim_am,
    sim_am_delta,
    sim_aou,
    sim_aou_random,
)

N, P, L, H, T, D = 3, 2, 2, 2, 5, 4


def observed(seed: int) -> Observed:
    generator = torch.Generator().manual_seed(seed)
    h, m = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((N, P, L, D), (N, P, L, H, T))
    )
    return Observed(h, m, torch.zeros(N, dtype=torch.int64))


ZSL, ICL, FT = observed(0), observed(1), observed(2)


def cos(a: Tensor, b: Tensor) -> float:
    return float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))


def test_sim_aou_is_the_mean_cosine_of_changes_of_unit_vectors() -> None:
    found = sim_aou(ICL, ZSL, FT)
    for n in range(N):
        for p in range(P):
            cosines = []
            for layer in range(L):
                z, i, f = (each.attention[n, p, layer] for each in (ZSL, ICL, FT))
                z, i, f = z / z.norm(), i / i.norm(), f / f.norm()
                cosines.append(cos(i - z, f - z))
            assert math.isclose(found[n, p], sum(cosines) / L, rel_tol=1e-9)


def test_sim_am_is_the_mean_cosine_of_scores_and_delta_of_their_changes() -> None:
    am, delta = sim_am(ICL, FT), sim_am_delta(ICL, ZSL, FT)
    for n in range(N):
        for p in range(P):
            places = [(layer, head) for layer in range(L) for head in range(H)]
            z, i, f = ([each.scores[n, p, *at] for at in places] for each in (ZSL, ICL, FT))
            plain = [cos(a, b) for a, b in zip(i, f, strict=True)]
            changes = [cos(a - c, b - c) for a, b, c in zip(i, f, z, strict=True)]
            assert math.isclose(am[n, p], sum(plain) / len(plain), rel_tol=1e-9)
            assert math.isclose(delta[n, p], sum(changes) / len(changes), rel_tol=1e-9)


def test_ft_as_icl_gives_one_and_as_zsl_nothing() -> None:
    one = torch.ones(N, P, dtype=torch.float64)
    torch.testing.assert_close(sim_aou(ICL, ZSL, ICL), one)
    torch.testing.assert_close(sim_am(ICL, ICL), one)
    torch.testing.assert_close(sim_am_delta(ICL, ZSL, ICL), one)
    assert sim_aou(ICL, ZSL, ZSL).isnan().all() and sim_am_delta(ICL, ZSL, ZSL).isnan().all()


def test_padding_with_zeros_changes_no_similarity_of_scores() -> None:
    wider = [
        Observed(each.attention, torch.nn.functional.pad(each.scores, (0, 3)), each.predicted)
        for each in (ICL, ZSL, FT)
    ]
    torch.testing.assert_close(sim_am(wider[0], wider[2]), sim_am(ICL, FT))
    torch.testing.assert_close(sim_am_delta(*wider), sim_am_delta(ICL, ZSL, FT))


def test_a_random_vector_is_not_centred_and_seeded() -> None:
    found = sim_aou_random(ICL, ZSL, seed=3)
    noise = torch.rand(ICL.attention.shape, generator=torch.Generator().manual_seed(3)).double()
    expected = cos(
        ICL.attention[0, 0, 0] / ICL.attention[0, 0, 0].norm()
        - ZSL.attention[0, 0, 0] / ZSL.attention[0, 0, 0].norm(),
        noise[0, 0, 0],
    )
    rest = cos(
        ICL.attention[0, 0, 1] / ICL.attention[0, 0, 1].norm()
        - ZSL.attention[0, 0, 1] / ZSL.attention[0, 0, 1].norm(),
        noise[0, 0, 1],
    )
    assert math.isclose(found[0, 0], (expected + rest) / 2, rel_tol=1e-6)
    assert torch.equal(found, sim_aou_random(ICL, ZSL, seed=3))


def labels(*of: list[int]) -> Answers:
    return Answers(*map(torch.tensor, of))


def share(ratio: Ratio) -> float:
    return ratio_cell([ratio]).mean


def from_counts(both: int, ft: int, icl: int) -> Answers:
    """Examples of a binary task that ZSL has wrong and ``ft``, ``icl``, ``both`` set right."""
    n = ft + icl - both
    return labels(
        [0] * n, [1] * icl + [0] * (n - icl), [0] * (n - ft) + [1] * ft, [1] * n
    )  # fmt: skip


@pytest.mark.parametrize(
    ("both", "ft", "icl", "rec", "jaccard"),
    [
        (22, 24, 22, 91.67, 91.7),  # CB, and the paper's Table 1
        (45, 49, 227, 91.84, 19.5),  # SST-2
        (7, 11, 181, 63.64, 3.8),  # SST-5
        (137, 141, 318, 97.16, 42.5),  # MR
        (271, 318, 435, 85.22, 56.2),  # Subj
        (81, 86, 228, 94.19, 34.8),  # SST-2, layer-causal
        (335, 418, 438, 80.14, 64.3),  # Subj, layer-causal
        (3, 9, 319, 33.33, 0.9),  # MR, layer-causal
    ],
)
def test_the_logs_counts_give_the_papers_numbers(
    both: int, ft: int, icl: int, rec: float, jaccard: float
) -> None:
    answers = from_counts(both, ft, icl)
    assert round(100 * share(answers.rec2ftp()), 2) == rec
    assert round(100 * share(answers.jaccard_correct()), 1) == jaccard


def test_only_the_same_label_counts_as_the_same_change() -> None:
    answers = labels([0, 0, 0, 0], [1, 1, 2, 0], [1, 2, 2, 1], [1, 1, 0, 1])
    # changed by both to the same: the first (right) and the third (wrong); FT alone: the fourth
    assert math.isclose(share(answers.jaccard()), 2 / (3 + 4 - 2))
    assert math.isclose(share(answers.jaccard_correct()), 1 / (2 + 2 - 1))
    assert math.isclose(share(answers.jaccard_incorrect()), 1 / (1 + 2 - 1))


label = st.integers(0, 2)


@given(st.lists(st.tuples(label, label, label, label), min_size=1, max_size=30))
def test_counting_identities(rows: list[tuple[int, int, int, int]]) -> None:
    answers = labels(*map(list, zip(*rows, strict=True)))
    parts = answers.jaccard_correct(), answers.jaccard_incorrect()
    every = answers.jaccard()
    for name in ("part", "whole"):  # changes to right and to wrong are all changes
        assert sum(getattr(each, name).sum() for each in parts) == getattr(every, name).sum()
    shares = [share(each) for each in parts if each.whole.sum() > 0]
    if len(shares) == 2:
        assert min(shares) - 1e-9 <= share(every) <= max(shares) + 1e-9
    same = Answers(answers.zsl, answers.icl, answers.icl, answers.gold)
    changed = bool((answers.icl != answers.zsl).any())
    assert math.isclose(share(same.jaccard()), 1) if changed else math.isnan(share(same.jaccard()))


def test_what_icl_sets_right_of_all_that_is_wrong_is_counted_with_or_without_ft() -> None:
    answers = labels([0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 1, 0])
    assert math.isclose(share(answers.icl_of_wrong()), 2 / 3, rel_tol=1e-6)
    assert math.isnan(share(answers.rec2ftp()))


def test_at_rate_0_no_label_changes() -> None:
    answers = labels([0, 1, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1])
    assert not answers.jaccard().part.any()
    assert share(answers.jaccard()) == 0 and math.isnan(share(answers.rec2ftp()))


def test_a_ratios_values_have_its_mean_and_the_delta_methods_error() -> None:
    part, whole = torch.tensor([1, 0, 1, 0, 0, 1]), torch.tensor([1, 1, 2, 0, 1, 1])
    cell = ratio_cell([Ratio(part, whole)])
    ratio = 3 / 6
    assert math.isclose(cell.mean, ratio)
    residuals = [p - ratio * w for p, w in zip(part.tolist(), whole.tolist(), strict=True)]
    variance = sum(r * r for r in residuals) / 5 / 6 / (6 / 6) ** 2
    assert math.isclose(cell.se, math.sqrt(variance))


def test_a_ratio_is_of_the_counts_of_all_seeds_also_where_one_has_none() -> None:
    none, some = torch.zeros(4, dtype=torch.int64), torch.tensor([1, 1, 0, 1])
    cell = ratio_cell([Ratio(none, none), Ratio(torch.tensor([1, 0, 0, 1]), some)])
    assert math.isclose(cell.mean, 2 / 3) and math.isfinite(cell.se)
    assert math.isnan(cell.of_each_seed[0]) and math.isclose(cell.of_each_seed[1], 2 / 3)
    assert math.isnan(ratio_cell([Ratio(none, none)]).mean)


@pytest.mark.parametrize("seed", [0, 1])
def test_kendalls_tau_and_recall_against_plain_counting(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randint(6, (8,), generator=generator).double() for _ in range(2))
    pairs: list[tuple[float, float]] = [
        (float(one[i] - one[j]), float(other[i] - other[j])) for i in range(8) for j in range(i)
    ]
    sign: Any = lambda x: (x > 0) - (x < 0)  # noqa: E731
    agree = sum(sign(a) * sign(b) for a, b in pairs)
    ties = [sum(pair[k] != 0 for pair in pairs) for k in range(2)]
    assert math.isclose(kendall_tau(one, other), agree / math.sqrt(ties[0] * ties[1]), rel_tol=1e-9)
    rows = torch.tensor([[5.0, 4, 3, 2, 1], [1, 2, 3, 4, 5]])
    assert recall_of_top(rows, rows.flip(0), 2).tolist() == [0, 0]
    assert recall_of_top(rows, rows.flip(0), 3).tolist() == [1 / 3, 1 / 3]
    assert kendall_tau(rows[0], rows[1]) == -1
