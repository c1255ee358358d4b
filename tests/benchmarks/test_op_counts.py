"""The number of kernels that a step starts does not grow unseen."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.studies import op_counts


@pytest.mark.usefixtures("cpp")
def test_a_block_in_cpp_starts_few_kernels() -> None:
    counts = op_counts.block_counts()
    assert counts.total() <= 208, counts.most_common(12)


def test_a_step_in_triton_starts_few_kernels() -> None:
    counts = op_counts.launches_1b()
    assert counts.total() <= 3800, counts.most_common(12)
