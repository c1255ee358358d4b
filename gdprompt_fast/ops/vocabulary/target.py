"""What the student's predictions are compared with: a teacher's distribution or the gold token."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .block import Block, slices


class Target(Protocol):
    """A distribution over the vocabulary for each of the N rows of every group."""

    def probabilities(self, block: Block) -> Tensor:
        """[G, N, v]."""
        ...

    @property
    def negative_entropy(self) -> Tensor | float:
        """Σ_v p log p, [G, N]."""
        ...


class GoldTarget:
    """All mass on the gold token: KL(target ‖ student) is its NLL."""

    negative_entropy = 0.0

    def __init__(self, ids_GN: Tensor, dtype: torch.dtype) -> None:
        self._ids_GN, self._dtype = ids_GN, dtype

    def probabilities(self, block: Block) -> Tensor:
        shape = *self._ids_GN.shape, block.width
        zeros = torch.zeros(shape, dtype=self._dtype, device=self._ids_GN.device)
        return block.subtract_one_hot_(zeros, self._ids_GN).neg_()


class TeacherTarget:
    """softmax of teacher logits, or of teacher states times the teacher's head.

    Args:
        logits_GNV: [G, N, V], or None.
        hidden_GND, head_VD: the teacher's states and head, or None.
        dtype: of the probabilities, fp32 or fp64.

    Raises:
        FloatingPointError: if the teacher's logits are not numbers.
    """

    def __init__(
        self,
        logits_GNV: Tensor | None,
        hidden_GND: Tensor | None,
        head_VD: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self._dtype = dtype
        self._logits_GNV, self._hidden_GND, self._head_VD = logits_GNV, hidden_GND, head_VD
        self._lse_GN, self.negative_entropy = self._statistics()
        if not torch.isfinite(self.negative_entropy).all():
            raise FloatingPointError(
                "teacher: expected finite predictions, got NaN or infinite ones"
            )

    def probabilities(self, block: Block) -> Tensor:
        return self._logits(block).sub_(self._lse_GN[..., None]).exp_()

    def _logits(self, block: Block) -> Tensor:
        if self._logits_GNV is not None:
            return block.select(self._logits_GNV).to(self._dtype, copy=True)
        assert self._hidden_GND is not None and self._head_VD is not None
        return block.project(self._hidden_GND, self._head_VD).to(self._dtype)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """log-sum-exp and Σ p log p, in one online pass over the vocabulary."""
        source = self._logits_GNV if self._logits_GNV is not None else self._hidden_GND
        assert source is not None
        groups, rows = source.shape[:2]
        vocabulary = len(self._head_VD) if self._head_VD is not None else source.shape[2]
        top = source.new_full((groups, rows), float("-inf"), dtype=self._dtype)
        total, weighted = torch.zeros_like(top), torch.zeros_like(top)
        for block in slices(vocabulary, groups * rows):
            z = self._logits(block)
            new_top = torch.maximum(top, z.amax(-1))
            shrink, e = (top - new_top).exp_(), (z - new_top[..., None]).exp_()
            total = total * shrink + e.sum(-1)
            weighted = weighted * shrink + (e * z).nan_to_num(nan=0.0).sum(-1)  # 0 · −∞ is 0
            top = new_top
        lse = top + total.log()
        return lse, weighted / total - lse
