"""The rows of a batch in group-major order."""

from __future__ import annotations

import torch
from torch import Tensor


class GroupedRows:
    """Maps the B rows of a batch to G groups of at most M rows each.

    Products between the queries and the contexts of one group are batched over groups, so rows are
    laid out as [G, M, …] with zeros in unused places. When the rows stand in that order already, it
    is a view.

    For kernels that take the rows where they are: those of group g are
    ``order_B[offset_G[g]:offset_G[g + 1]]``.
    """

    def __init__(self, group_B: Tensor, groups: int) -> None:
        counts = torch.bincount(group_B, minlength=groups)
        self.group_B = group_B
        self.groups = groups
        self.per_group = int(counts.max())
        order = torch.argsort(group_B, stable=True)
        self.order_B = order
        self.offset_G = torch.nn.functional.pad(torch.cumsum(counts, 0), (1, 0))
        rank = torch.arange(len(group_B), device=group_B.device) - self.offset_G[group_B[order]]
        self._slot_B = torch.empty_like(order)
        self._slot_B[order] = group_B[order] * self.per_group + rank
        slots = groups * self.per_group
        self.in_order = slots == len(group_B) and bool(
            (self._slot_B == torch.arange(slots, device=group_B.device)).all()
        )

    def __len__(self) -> int:
        return len(self.group_B)

    def to_groups(self, x: Tensor, fill: float = 0) -> Tensor:
        """[B, *rest] → [G, M, *rest], ``fill`` in unused places."""
        if not self.in_order:
            padded = x.new_full((self.groups * self.per_group, *x.shape[1:]), fill)
            padded[self._slot_B] = x
            x = padded
        return x.reshape(self.groups, self.per_group, *x.shape[1:])

    def from_groups(self, x: Tensor) -> Tensor:
        """[G, M, *rest] → [B, *rest]."""
        x = x.reshape(self.groups * self.per_group, *x.shape[2:])
        return x if self.in_order else x[self._slot_B]

    def tokens_to_groups(self, x_BTD: Tensor) -> Tensor:
        """[B, *T, D] → [G, M·T, D]."""
        return self.to_groups(x_BTD).reshape(self.groups, -1, x_BTD.shape[-1])

    def tokens_from_groups(self, x_GSD: Tensor, tokens: tuple[int, ...]) -> Tensor:
        """[G, M·T, D] → [B, *T, D], the inverse of :meth:`tokens_to_groups`; ``tokens`` is *T."""
        return self.from_groups(
            x_GSD.reshape(self.groups, self.per_group, *tokens, x_GSD.shape[-1])
        )
