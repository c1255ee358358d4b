"""Some columns of the vocabulary: every [tokens, vocabulary] matrix exists for one block at a time
only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..blocks import block_ranges

# A tile of [all tokens, block] has about this many elements; a pass keeps a few of them alive. On a
# CPU it should fit the cache; on a GPU it should be wide, as what happens once a block to the sums
# [all tokens, hidden] costs the more the fewer columns share it.
TILE_ELEMENTS = 1 << 21
CUDA_TILE_ELEMENTS = 1 << 25
WIDEST = 1 << 15  # block: few tokens need no wider one for that
ALIGNMENT = 128  # of wide blocks: matrix units like whole tiles


def tile_elements(device: torch.device) -> int:
    return CUDA_TILE_ELEMENTS if device.type == "cuda" else TILE_ELEMENTS


def wide(t: Tensor) -> Tensor:
    """fp32 for half precision: softmax and its gradients are never computed in less."""
    return t if t.dtype == torch.float64 else t.float()


def adds_in_wide(t: Tensor) -> bool:
    """Whether the library of matrix products adds those of ``t`` up in fp32 without rounding."""
    return t.is_cuda and torch.version.hip is None and t.dtype in (torch.bfloat16, torch.float16)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b of matrices or batches of them, in fp32 or fp64."""
    if adds_in_wide(b):
        product = torch.ops.aten.bmm if a.dim() == 3 else torch.ops.aten.mm
        return product.dtype(a, b, torch.float32)
    return wide(a @ b)


def add_product_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x += a b, of matrices or batches of them; an fp32 x keeps what is small beside it."""
    if x.dtype == b.dtype:
        add = torch.Tensor.baddbmm_ if x.dim() == 3 else torch.Tensor.addmm_
        return add(x, a, b)
    if adds_in_wide(b):
        product = torch.ops.aten.baddbmm if x.dim() == 3 else torch.ops.aten.addmm
        return product.dtype_out(x, a, b, x.dtype, out=x)
    return x.add_(a @ b)


class Block:
    """Columns of the vocabulary, the same for all groups or each group's own.

    Letters: G groups, N rows of a group, D hidden size, v columns of this block (its width), V all
        columns.
    """

    columns: int | Tensor  # the first of contiguous ones, or their ids [G, v]

    def project(self, h_GND: Tensor, weight_VD: Tensor, in_wide: bool = False) -> Tensor:
        """h Wᵀ at these columns, [G, N, v], in h's dtype, or in fp32 or fp64."""
        raise NotImplementedError

    def select(self, x_GNV: Tensor) -> Tensor:
        """These columns of a matrix with all of them, [G, N, v]."""
        raise NotImplementedError

    def add_at_(self, x_GNv: Tensor, ids_GS: Tensor, values_GNS: Tensor) -> Tensor:
        """x[g, n, column of ids[g, s]] += values[g, n, s], for the ids that are here."""
        raise NotImplementedError


class Slice(Block):
    """The columns start, …, stop − 1, for all groups."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.columns = start, stop, start

    def project(self, h_GND: Tensor, weight_VD: Tensor, in_wide: bool = False) -> Tensor:
        product = wide_product if in_wide else torch.matmul
        z_Nv = product(h_GND.flatten(0, 1), self.rows_of(weight_VD).to(h_GND.dtype).T)
        return z_Nv.view(*h_GND.shape[:2], -1)

    def rows_of(self, weight_VD: Tensor) -> Tensor:
        """The rows of W for these columns, [v, D]."""
        return weight_VD[self.start : self.stop]

    def expand(self, x_GNv: Tensor, weight_VD: Tensor) -> Tensor:
        """x W over these columns, [G, N, D]: this block's share of a product with all of W."""
        return (x_GNv.flatten(0, 1) @ self.rows_of(weight_VD)).view(*x_GNv.shape[:2], -1)

    def select(self, x_GNV: Tensor) -> Tensor:
        return x_GNV[..., self.start : self.stop]

    def add_at_(self, x_GNv: Tensor, ids_GS: Tensor, values_GNS: Tensor) -> Tensor:
        # Ids that are not here add zeros, all over the block: a GPU's additions to one place wait
        # for each other.
        offset = ids_GS - self.start
        columns = offset.remainder(self.stop - self.start)
        values = (values_GNS * (columns == offset)[:, None, :]).to(x_GNv.dtype)
        return x_GNv.scatter_add_(2, columns[:, None, :].expand_as(values), values)


class Columns(Block):
    """The columns ids[g], each group's own."""

    def __init__(self, ids_Gv: Tensor) -> None:
        self.columns = self.ids_Gv = ids_Gv
        self._valid_Gv = ids_Gv.clamp(min=0)

    def rows_of(self, weight_VD: Tensor) -> Tensor:
        """The rows of W for these columns, [G, v, D]."""
        return weight_VD[self._valid_Gv]

    def project(self, h_GND: Tensor, weight_VD: Tensor, in_wide: bool = False) -> Tensor:
        product = wide_product if in_wide else torch.matmul
        return product(h_GND, self.rows_of(weight_VD).to(h_GND.dtype).transpose(1, 2))

    def select(self, x_GNV: Tensor) -> Tensor:
        return x_GNV.gather(2, self._valid_Gv[:, None, :].expand(-1, x_GNV.shape[1], -1))

    def add_at_(self, x_GNv: Tensor, ids_GS: Tensor, values_GNS: Tensor) -> Tensor:
        return x_GNv.baddbmm_(values_GNS.to(x_GNv.dtype), self.matches(ids_GS, x_GNv.dtype))

    def matches(self, ids_GN: Tensor, dtype: torch.dtype) -> Tensor:
        """1 where ids[g, n] is column v, [G, N, v]."""
        return (ids_GN[:, :, None] == self.ids_Gv[:, None, :]).to(dtype)


def slices(vocabulary: int, tokens: int, device: torch.device) -> Iterator[Slice]:
    """The whole vocabulary, in blocks whose tiles have about :func:`tile_elements`."""
    size = max(1, min(vocabulary, WIDEST, tile_elements(device) // max(1, tokens)))
    if ALIGNMENT < size < vocabulary:
        size -= size % ALIGNMENT
    for start, stop in block_ranges(vocabulary, size):
        yield Slice(start, stop)


def column_blocks(ids_GS: Tensor) -> Iterator[Columns]:
    """The columns ids[g], in blocks of about tile elements / (all S rows of all groups)."""
    for ids_Gv in ids_GS.split(max(1, tile_elements(ids_GS.device) // ids_GS.numel()), dim=1):
        yield Columns(ids_Gv)
