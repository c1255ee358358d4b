"""Sums over the vocabulary weighted by softmax(z), a tile at a time (as in FlashAttention)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backend import implementation
from .block import wide


class OnlineSums:
    """Of R rows for the N rows of h [G, N, D]: Σ_v e^(z − top) times anything, top = max z so far.

    Attributes:
        total_GR: Σ_v e^(z − top).
        value_GN: what the passes of a target sum beside it.
    """

    def __init__(self, h_GND: Tensor, rows_per_token: int) -> None:
        groups, tokens = h_GND.shape[:2]
        self.dtype = h_GND.dtype
        self.value_GN = wide(h_GND.new_zeros(groups, tokens))
        self.total_GR = self.value_GN.new_zeros(groups, rows_per_token * tokens)
        # finite: a row whose logits so far are all −∞ has sums of zero, not NaN
        self._top_GR = torch.full_like(self.total_GR, torch.finfo(self.total_GR.dtype).min)
        self._shrink_GR = torch.ones_like(self._top_GR)
        self._sums: list[Tensor] = []

    def exponentials(self, online_pass: Callable[..., tuple[Tensor, ...]], *tile: object) -> Tensor:
        """e^(z − top) of a tile, [G, R, v], by a pass that brings the statistics up to it."""
        e, self._top_GR, self.total_GR, self.value_GN, self._shrink_GR = online_pass(
            *tile, self.dtype, self._top_GR, self.total_GR, self.value_GN
        )
        return e

    def add(self, shares_GRX: list[Tensor]) -> None:
        """The products with the exponentials of the last tile, added to those of the others."""
        if not self._sums:
            self._sums = [wide(share) for share in shares_GRX]
            return
        for total_GRX, share_GRX in zip(self._sums, shares_GRX, strict=True):
            passes = implementation("vocabulary", total_GRX)
            passes.accumulate_(total_GRX, share_GRX, self._shrink_GR)

    @property
    def lse_GR(self) -> Tensor:
        return self._top_GR + self.total_GR.log()

    def means(self) -> list[Tensor]:
        """Every sum weighted by softmax(z) instead."""
        return [total_GRX / self.total_GR[..., None] for total_GRX in self._sums]
