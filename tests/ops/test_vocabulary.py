"""The losses at an updated head, and the tied table, against both materialised in fp64."""

from __future__ import annotations

import pytest
import torch

from gdprompt_fast.ops.vocabulary import block as vocabulary_block
from helpers.materialised import (
    assert_same_value_and_gradients,
    leaf,
    vocabulary_materialised,
    vocabulary_twice,
)

pytestmark = pytest.mark.quick


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("objective", ["gold", "teacher"])
@pytest.mark.parametrize("tied", [False, True], ids=["head-alone", "tied"])
@pytest.mark.parametrize("tile", [1 << 21, 8], ids=["one-block", "many-blocks"])
def test_the_losses_at_an_inner_updated_head_and_their_double_backward_are_right(
    tile: int, tied: bool, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_block, "TILE_ELEMENTS", tile)
    ids = [torch.tensor([[1, 2, 1], [0, 3, 2]]), torch.tensor([[1, 0], [2, 3], [4, 1]])]
    groups = [torch.tensor([0, 1]), torch.tensor([1, 1, 0])]
    teacher = leaf(3, 7).detach() if objective == "teacher" else None
    assert_same_value_and_gradients(
        lambda table, mix: vocabulary_twice(table, mix, ids, groups, tied, teacher),
        lambda table, mix: vocabulary_materialised(table, mix, ids, groups, tied, teacher),
        (leaf(7, 3), leaf(3, 3)),
    )
