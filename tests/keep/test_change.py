"""W' − W in factors: exact, or the best of a rank with what that discards."""

from __future__ import annotations

import pytest
import torch

from gdprompt_fast.update.change import WeightChange

pytestmark = pytest.mark.quick

DOUBLE = torch.float64


def random_change(outputs: int, inputs: int, *rows: int) -> tuple[WeightChange, torch.Tensor]:
    """A change of so many rows at a time, and the matrix that it is."""
    torch.manual_seed(0)
    change, dense = WeightChange(outputs, inputs), torch.zeros(outputs, inputs, dtype=DOUBLE)
    for count in rows:
        left, right = torch.randn(count, outputs, dtype=DOUBLE), torch.randn(count, inputs).double()
        change.add(left, right)
        dense += left.T @ right
    return change, dense


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)], ids=str)
@pytest.mark.parametrize("rows", [(3,), (2, 3), (6,), (9,), (3, 9, 2)], ids=str)
def test_it_is_exact_at_its_rank(shape: tuple[int, int], rows: tuple[int, ...]) -> None:
    change, dense = random_change(*shape, *rows)
    product = change.low_rank()
    assert product.rank == change.rank == min(sum(rows), 7)
    assert product.discarded == 0.0
    torch.testing.assert_close(product.b_OR @ product.a_RI, dense)
    weight = torch.randn(*shape, dtype=DOUBLE)
    torch.testing.assert_close(change.add_to(weight), weight + dense)


@pytest.mark.parametrize("rows", [(5,), (3, 9, 2)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_smaller_rank_is_the_best_there_is_and_says_what_it_discards(
    rows: tuple[int, ...], rank: int
) -> None:
    change, dense = random_change(12, 7, *rows)
    product = change.low_rank(rank)
    u, s, v = torch.linalg.svd(dense)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(product.b_OR @ product.a_RI, best)
    lost = (dense - product.b_OR @ product.a_RI).square().sum() / dense.square().sum()
    assert product.rank == rank
    assert product.discarded == pytest.approx(float(lost)) and lost > 1e-4


def test_rows_of_zeros_have_no_rank() -> None:
    change, left = WeightChange(12, 7), torch.randn(5, 12)
    left[[1, 4]] = 0
    change.add(left, torch.randn(5, 7))
    assert change.rank == 3


def test_factors_in_half_precision_are_kept_in_fp32() -> None:
    change = WeightChange(12, 7)
    change.add(torch.randn(3, 12).bfloat16(), torch.randn(3, 7).bfloat16())
    assert change.low_rank().b_OR.dtype == torch.float32
    assert change.add_to(torch.zeros(12, 7).bfloat16()).dtype == torch.bfloat16


def test_both_factors_are_of_one_size() -> None:
    """As half precision wants them: η makes one tiny."""
    change = WeightChange(12, 7)
    change.add(1e-9 * torch.randn(3, 12), torch.randn(3, 7))
    product = change.low_rank()
    torch.testing.assert_close(product.b_OR.norm(dim=0), product.a_RI.norm(dim=1))


def test_a_product_is_filled_up_with_zeros() -> None:
    change, dense = random_change(12, 7, 3)
    product = change.low_rank().padded(8)
    assert product.b_OR.shape == (12, 8) and product.a_RI.shape == (8, 7)
    torch.testing.assert_close(product.b_OR @ product.a_RI, dense)


def test_no_change_has_rank_zero() -> None:
    product = WeightChange(12, 7).low_rank()
    assert product.rank == 0 and product.b_OR.shape == (12, 0) and product.discarded == 0.0
