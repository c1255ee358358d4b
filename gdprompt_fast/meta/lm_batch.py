"""The rows of L_LM, the language-modelling term of the outer loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import check_tokens, describe
from ..errors import UserError
from ..layout import rung
from ..rows import GroupedRows


class LMBatch:
    """Texts for L_LM, with what depends on their values worked out once on the host.

    Args:
        ids: LongTensor [N, T].
        mask: BoolTensor [N, T], True on real tokens; padding is on the right.

    Attributes:
        position_P: where each token that predicts another stands in the flattened ids [N·T].
        weight_P: fp64, of each in its row's mean.
        predictions, rows: the P predicting tokens, and the N rows, as those of one group.
        id_range: the lowest and highest token id.
        real: how many of the rows count.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        check_tokens("lm_batch", ids, mask, "[N, T]")
        host, device = mask.cpu(), ids.device
        lengths_N = host.sum(1) - 1
        if (lengths_N < 1).any():
            raise UserError("lm_batch: expected at least 2 real tokens in every row")
        row_P, column_P = host[:, 1:].nonzero(as_tuple=True)
        weight_P = (1.0 / lengths_N.double())[row_P]
        self.ids, self.mask, self.host_mask, self.real = ids, mask, host, len(ids)
        self.id_range = int(ids.min()), int(ids.max())
        self.position_P = (row_P * host.shape[1] + column_P).to(device)
        self.weight_P = weight_P.to(device)
        self.predictions, self.rows = (
            GroupedRows(torch.zeros(n, dtype=torch.long), 1).map(lambda tensor: tensor.to(device))
            for n in (len(row_P), len(ids))
        )

    @staticmethod
    def padding() -> LMBatch:
        """A row that counts for nothing, as where a process has no share of the rows."""
        ids = torch.zeros(1, 2, dtype=torch.long)
        made = LMBatch(ids, torch.ones_like(ids, dtype=torch.bool))
        made.weight_P, made.real = made.weight_P * 0, 0
        return made

    @staticmethod
    def weighted(ids: Tensor, weight_BT: Tensor) -> LMBatch:
        """Rows of which every token with a weight > 0, but a first one, counts with that, in place
        of all in their rows' means.
        """
        made = LMBatch(ids, torch.ones_like(ids, dtype=torch.bool))
        weight_NP = weight_BT[:, 1:]
        row_P, column_P = weight_NP.nonzero(as_tuple=True)
        made.position_P = row_P * ids.shape[1] + column_P
        made.weight_P = weight_NP[row_P, column_P].double()
        made.predictions = GroupedRows(torch.zeros_like(row_P), 1)
        return made

    @staticmethod
    def of(given: Any) -> LMBatch:
        """An LMBatch, or a pair (ids, mask), as one."""
        if isinstance(given, LMBatch):
            return given
        if not isinstance(given, tuple) or len(given) != 2:
            raise UserError(
                f"lm_batch: expected an LMBatch or a pair (ids, mask), got {describe(given)}"
            )
        return LMBatch(*given)

    def map(self, change: Callable[[Tensor], Tensor]) -> LMBatch:
        """The same rows with ``change``, which keeps values, applied to every tensor."""
        changed = copy.copy(self)
        for name in ("ids", "mask", "position_P", "weight_P"):
            setattr(changed, name, change(getattr(self, name)))
        changed.predictions, changed.rows = self.predictions.map(change), self.rows.map(change)
        return changed

    def on_ladder(self) -> LMBatch:
        """The rows padded, with what counts for nothing, to sizes of a short ladder."""
        tokens, count = rung(self.ids.shape[1]), rung(len(self.position_P))
        wider, more = tokens - self.ids.shape[1], count - len(self.position_P)
        if not wider and not more:
            return self
        padded = copy.copy(self)
        padded.ids, padded.mask = F.pad(self.ids, (0, wider)), F.pad(self.mask, (0, wider))
        row_P = self.position_P // self.ids.shape[1]
        padded.position_P = F.pad(self.position_P + row_P * wider, (0, more))
        padded.weight_P = F.pad(self.weight_P, (0, more))
        group_P = torch.zeros(count, dtype=torch.long)
        device = self.ids.device
        padded.predictions = GroupedRows(group_P, 1).map(lambda tensor: tensor.to(device))
        return padded

    def to(self, device: torch.device | str) -> LMBatch:
        """The same rows on ``device``; nothing is checked or worked out again."""
        return self.map(lambda tensor: tensor.to(device))

    def __len__(self) -> int:
        return len(self.ids)

    def chunks(self, count: int) -> Iterator[LMBatch]:
        """The rows in ``count`` parts, or as many as there are rows."""
        if min(count, len(self)) == 1:
            yield self
            return
        for ids, mask in zip(self.ids.chunk(count), self.mask.chunk(count), strict=True):
            yield LMBatch(ids, mask)
