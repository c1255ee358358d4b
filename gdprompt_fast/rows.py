"""The rows of a batch in group-major order."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor


class GroupedRows:
    """Maps the B rows of a batch to G groups of at most M rows each.

    Products between the queries and the contexts of one group are batched over groups, so rows are
    laid out as [G, M, …] with zeros in unused places. When the rows stand in that order already, it
    is a view.

    For kernels that take the rows where they are: those of group g are
    ``order_B[offset_G[g]:offset_G[g + 1]]``.

    Made on the host, from the values of ``group_B``: it reads them back where they are not there.

    Args:
        group_B: LongTensor [B], the group of every row.
        groups: G.
        per_group: M, where it is to be more than the largest group needs.
    """

    def __init__(self, group_B: Tensor, groups: int, per_group: int = 0) -> None:
        group = group_B.cpu()
        counts = torch.bincount(group, minlength=groups)
        order = torch.argsort(group, stable=True)
        offset_G = torch.nn.functional.pad(torch.cumsum(counts, 0), (1, 0))
        self.groups, self.rows = groups, len(group)
        self.per_group = max(per_group, int(counts.max()))
        rank = torch.arange(len(group)) - offset_G[group[order]]
        slot_B = torch.empty_like(order)
        slot_B[order] = group[order] * self.per_group + rank
        self.in_order = slot_B.tolist() == list(range(groups * self.per_group))
        # One row a group, in order: what is [G, …] is [B, …] already.
        self.one_each = self.in_order and self.per_group == 1
        self.group_B, self.order_B, self.offset_G, self._slot_B = (
            tensor.to(group_B.device) for tensor in (group, order, offset_G, slot_B)
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> GroupedRows:
        """The same with ``change`` applied to every tensor."""
        changed = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(changed, name, change(value))
        return changed

    def __len__(self) -> int:
        return self.rows

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
