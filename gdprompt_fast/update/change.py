"""W' − W of a weight and one group, in the factors it came in, or dense where that is smaller."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """B A, with B [O, r] and A [r, I].

    Attributes:
        discarded: ‖ΔW − B A‖² / ‖ΔW‖², in Frobenius norms; 0 where B A is ΔW.
    """

    b_OR: Tensor
    a_RI: Tensor
    discarded: float

    @property
    def rank(self) -> int:
        """r."""
        return len(self.a_RI)

    def padded(self, rank: int) -> LowRank:
        """The same product of a higher rank, filled up with zeros."""
        more, pad = rank - self.rank, torch.nn.functional.pad
        return LowRank(pad(self.b_OR, (0, more)), pad(self.a_RI, (0, 0, 0, more)), self.discarded)


class WeightChange:
    """ΔW = Σ leftᵀ right [O, I], in fp32 or fp64.

    Pairs (left [K, O], right [K, I]) are kept as they are while they are fewer than min(O, I) rows;
    from there on their sum is, which is never larger than the weight.
    """

    def __init__(self, outputs: int, inputs: int) -> None:
        self.outputs, self.inputs = outputs, inputs
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._dense_OI: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank of the exact product: the rows of all pairs, or min(O, I)."""
        if self._dense_OI is not None:
            return min(self.outputs, self.inputs)
        return sum(len(left) for left, _ in self._pairs)

    @property
    def finite(self) -> bool:
        """Whether the factors, and so all that is made of them, are within the dtype's range."""
        norms = [left.norm() * right.norm() for left, right in self._pairs]
        norms += [] if self._dense_OI is None else [self._dense_OI.norm()]
        return all(bool(norm.isfinite()) for norm in norms)

    def add(self, left_KO: Tensor, right_KI: Tensor) -> None:
        """ΔW += leftᵀ right; rows of zeros, as those of padding, are left out.

        Raises:
            ValueError: for factors of another weight.
        """
        if (left_KO.shape[1:], right_KI.shape[1:]) != ((self.outputs,), (self.inputs,)):
            sizes = tuple(left_KO.shape), tuple(right_KI.shape)
            raise ValueError(f"expected factors of [{self.outputs}, {self.inputs}], got {sizes}")
        left_KO, right_KI = wide(left_KO), wide(right_KI)
        counts = left_KO.any(1) & right_KI.any(1)
        if not counts.all():
            left_KO, right_KI = left_KO[counts], right_KI[counts]
        if self.holds(self.rank + len(left_KO)):
            self._pairs += [(left_KO, right_KI)] if len(left_KO) else []
        else:
            self.add_dense(left_KO.T @ right_KI)

    def holds(self, rows: int) -> bool:
        """Whether pairs of so many rows are kept as they are."""
        return self._dense_OI is None and rows < min(self.outputs, self.inputs)

    def add_dense(self, change_OI: Tensor) -> None:
        """ΔW += a matrix of the weight's size, which becomes this one's."""
        total = change_OI if self._dense_OI is None else self._dense_OI.add_(change_OI)
        for left, right in self._pairs:
            total.addmm_(left.T, right)
        self._pairs, self._dense_OI = [], total

    def add_to(self, weight_OI: Tensor) -> Tensor:
        """W + ΔW, in the weight's dtype, rounded once."""
        total = wide(weight_OI.detach()).clone()
        for left, right in self._pairs:
            total.addmm_(left.T.to(total.dtype), right.to(total.dtype))
        if self._dense_OI is not None:
            total += self._dense_OI
        return total.to(weight_OI.dtype)

    def low_rank(self, rank: int | None = None) -> LowRank:
        """ΔW as a product: exact where the rank allows (None: always), else the best of that rank
        by the SVD, which is taken of the small matrix between the factors' orthonormal bases.
        """
        b_OR, a_RI = self._factors()
        if rank is None or rank >= len(a_RI):
            return LowRank(*_balanced(b_OR, a_RI), 0.0)
        q_b, r_b = torch.linalg.qr(b_OR)
        q_a, r_a = torch.linalg.qr(a_RI.T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        total = s.square().sum()
        discarded = float(s[rank:].square().sum() / total) if total > 0 else 0.0
        root = s[:rank].sqrt()
        return LowRank(q_b @ (u[:, :rank] * root), (q_a @ (v[:rank].T * root)).T, discarded)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """B [O, K] and A [K, I] with B A = ΔW."""
        if (dense := self._dense_OI) is not None:
            if self.outputs <= self.inputs:
                return torch.eye(self.outputs, dtype=dense.dtype, device=dense.device), dense
            return dense, torch.eye(self.inputs, dtype=dense.dtype, device=dense.device)
        if not self._pairs:
            return torch.zeros(self.outputs, 0), torch.zeros(0, self.inputs)
        left_KO, right_KI = (torch.cat(rows) for rows in zip(*self._pairs, strict=True))
        return left_KO.T, right_KI


def _balanced(b_OR: Tensor, a_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of B as long as the rows of A, so that a half-precision copy of
    either keeps what it can.
    """
    ratio = (b_OR.norm(dim=0) / a_RI.norm(dim=1).clamp_min(torch.finfo(a_RI.dtype).tiny)).sqrt()
    ratio = torch.where(ratio > 0, ratio, 1.0)
    return b_OR / ratio, a_RI * ratio[:, None]


def wide(t: Tensor) -> Tensor:
    """In fp32 at least."""
    return t if t.dtype == torch.float64 else t.float()
