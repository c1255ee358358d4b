"""Some columns of the vocabulary: every [tokens, vocabulary] matrix exists for one block at a time
only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..blocks import block_ranges

# A tile of [all tokens, block] has about this many elements; a pass keeps a few of them alive.
TILE_ELEMENTS = 1 << 21


def wide(t: Tensor) -> Tensor:
    """fp32 for half precision: softmax and its gradients are never computed in less."""
    return t if t.dtype == torch.float64 else t.float()


class Block:
    """Columns of the vocabulary, the same for all groups or each group's own.

    Letters: G groups, N rows of a group, D hidden size, v columns of this block (its width), V all
        columns.
    """

    width: int

    def project(self, h_GND: Tensor, weight_VD: Tensor) -> Tensor:
        """h Wᵀ at these columns, [G, N, v], in fp32 or fp64."""
        raise NotImplementedError

    def select(self, x_GNV: Tensor) -> Tensor:
        """These columns of a matrix with all of them, [G, N, v]."""
        raise NotImplementedError

    def add_at_(self, x_GNv: Tensor, ids_GS: Tensor, values_GNS: Tensor) -> Tensor:
        """x[g, n, column of ids[g, s]] += values[g, n, s], for the ids that are here."""
        raise NotImplementedError

    def subtract_one_hot_(self, x_GNv: Tensor, ids_GN: Tensor) -> Tensor:
        """x[g, n, column of ids[g, n]] −= 1, for the ids that are here."""
        raise NotImplementedError


class Slice(Block):
    """The columns start, …, stop − 1, for all groups."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.width = start, stop, stop - start

    def project(self, h_GND: Tensor, weight_VD: Tensor) -> Tensor:
        weight = weight_VD[self.start : self.stop].to(h_GND.dtype)
        logits = h_GND.flatten(0, 1) @ weight.T
        return wide(logits).view(*h_GND.shape[:2], -1)

    def expand(self, x_GNv: Tensor, weight_VD: Tensor) -> Tensor:
        """x W over these columns, [G, N, D]: this block's share of a product with all of W."""
        weight = weight_VD[self.start : self.stop]
        return wide(x_GNv.flatten(0, 1).to(weight.dtype) @ weight).view(*x_GNv.shape[:2], -1)

    def select(self, x_GNV: Tensor) -> Tensor:
        return x_GNV[..., self.start : self.stop]

    def add_at_(self, x_GNv: Tensor, ids_GS: Tensor, values_GNS: Tensor) -> Tensor:
        columns, here = self._columns(ids_GS)
        index = columns[:, None, :].expand_as(values_GNS)
        return x_GNv.scatter_add_(2, index, values_GNS * here[:, None, :].to(values_GNS.dtype))

    def subtract_one_hot_(self, x_GNv: Tensor, ids_GN: Tensor) -> Tensor:
        columns, here = self._columns(ids_GN)
        return x_GNv.scatter_add_(2, columns[..., None], -here[..., None].to(x_GNv.dtype))

    def pick(self, x_GNv: Tensor, ids_GN: Tensor) -> Tensor:
        """x[g, n, column of ids[g, n]], zero for the ids that are not here; [G, N]."""
        columns, here = self._columns(ids_GN)
        return x_GNv.gather(2, columns[..., None])[..., 0] * here

    def _columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        here = (ids >= self.start) & (ids < self.stop)
        return torch.where(here, ids - self.start, 0), here


class Columns(Block):
    """The columns ids[g], each group's own."""

    def __init__(self, ids_Gv: Tensor) -> None:
        self.ids_Gv = ids_Gv
        self.width = ids_Gv.shape[1]
        self._valid_Gv = ids_Gv.clamp(min=0)

    def rows_of(self, weight_VD: Tensor) -> Tensor:
        """The rows of W for these columns, [G, v, D]."""
        return weight_VD[self._valid_Gv]

    def project(self, h_GND: Tensor, weight_VD: Tensor) -> Tensor:
        return wide(h_GND @ self.rows_of(weight_VD).to(h_GND.dtype).transpose(1, 2))

    def select(self, x_GNV: Tensor) -> Tensor:
        return x_GNV.gather(2, self._valid_Gv[:, None, :].expand(-1, x_GNV.shape[1], -1))

    def add_at_(self, x_GNv: Tensor, ids_GS: Tensor, values_GNS: Tensor) -> Tensor:
        return x_GNv.baddbmm_(values_GNS, self.matches(ids_GS, values_GNS.dtype))

    def subtract_one_hot_(self, x_GNv: Tensor, ids_GN: Tensor) -> Tensor:
        return x_GNv.sub_(self.matches(ids_GN, x_GNv.dtype))

    def matches(self, ids_GN: Tensor, dtype: torch.dtype) -> Tensor:
        """1 where ids[g, n] is column v, [G, N, v]."""
        return (ids_GN[:, :, None] == self.ids_Gv[:, None, :]).to(dtype)


def slices(vocabulary: int, tokens: int) -> Iterator[Slice]:
    """The whole vocabulary, in blocks of about TILE_ELEMENTS / tokens columns."""
    size = max(1, min(vocabulary, TILE_ELEMENTS // max(1, tokens)))
    for start, stop in block_ranges(vocabulary, size):
        yield Slice(start, stop)


def column_blocks(ids_GS: Tensor) -> Iterator[Columns]:
    """The columns ids[g], in blocks of about TILE_ELEMENTS / (all S rows of all groups)."""
    for ids_Gv in ids_GS.split(max(1, TILE_ELEMENTS // ids_GS.numel()), dim=1):
        yield Columns(ids_Gv)
