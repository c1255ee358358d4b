"""What the student's predictions are compared with: a teacher's distribution or the gold token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..backend import implementation
from ..eager.vocabulary import Into
from .block import Block, Slice
from .online import OnlineSums

Gather = Callable[[Tensor], list[Tensor]]


class Target(Protocol):
    """A distribution T over the vocabulary for each of the N rows of every group; the student's is
    P = softmax(z).
    """

    rows_per_token: int  # that are summed online

    def exponentials(self, online: OnlineSums, block: Slice, z_GNv: Tensor) -> Tensor:
        """What a tile adds to the online sums, [G, R, v]."""
        ...

    def loss(self, online: OnlineSums) -> Tensor:
        """KL(T ‖ P) of every row after the last tile, [G, N]."""
        ...

    def failure(self) -> tuple[Exception, Tensor] | None:
        """After :meth:`loss`, an error and a bool on the device that says whether it is one."""
        ...

    def difference(self, online: OnlineSums, gather: Gather) -> list[Tensor]:
        """(P − T) Xᵀ after the last tile, for every X [D, V] whose products with the exponentials
        are in ``online``; ``gather(ids)`` returns their columns, [G, N, D].
        """
        ...

    def tile(self, block: Block, z_GNv: Tensor, lse_GN: Tensor, into: Into) -> Tensor:
        """P − T in a block, after :meth:`loss`; [G, N, v]."""
        ...


class NLLTarget:
    """All mass on the gold token: KL(T ‖ P) is its NLL."""

    rows_per_token = 1

    def __init__(self, ids_GN: Tensor) -> None:
        self._ids_GN = ids_GN

    def exponentials(self, online: OnlineSums, block: Slice, z_GNv: Tensor) -> Tensor:
        passes = implementation("vocabulary", z_GNv)
        return online.exponentials(passes.online_softmax, z_GNv, self._ids_GN, block.start)

    def loss(self, online: OnlineSums) -> Tensor:
        return online.lse_GR - online.value_GN

    def failure(self) -> None:
        return None

    def difference(self, online: OnlineSums, gather: Gather) -> list[Tensor]:
        return [p - t for p, t in zip(online.means(), gather(self._ids_GN), strict=True)]

    def tile(self, block: Block, z_GNv: Tensor, lse_GN: Tensor, into: Into) -> Tensor:
        passes = implementation("vocabulary", z_GNv)
        return passes.softmax_minus_one_hot(z_GNv, lse_GN, into, self._ids_GN, block.columns)


class KLTarget:
    """softmax of teacher logits, or of teacher states times the teacher's head; the teacher's rows
    are summed below the student's.

    Args:
        logits_GNV: [G, N, V], or None.
        hidden_GND, head_VD: the teacher's states and head, or None.
    """

    rows_per_token = 2

    def __init__(
        self,
        logits_GNV: Tensor | None,
        hidden_GND: Tensor | None,
        head_VD: Tensor | None,
    ) -> None:
        self._logits_GNV, self._hidden_GND = logits_GNV, hidden_GND
        self._head_VD = head_VD
        self._lse_GN: Tensor | None = None  # known after the loss

    def exponentials(self, online: OnlineSums, block: Slice, z_GNv: Tensor) -> Tensor:
        passes = implementation("vocabulary", z_GNv)
        return online.exponentials(passes.online_kl, z_GNv, self._logits(block))

    def loss(self, online: OnlineSums) -> Tensor:
        student_lse_GN, teacher_lse_GN = online.lse_GR.chunk(2, dim=1)
        self._lse_GN = teacher_lse_GN.contiguous()  # once: every block of every pass reads it
        _, teacher_total_GN = online.total_GR.chunk(2, dim=1)
        return student_lse_GN - self._lse_GN + online.value_GN / teacher_total_GN

    def failure(self) -> tuple[Exception, Tensor]:
        assert self._lse_GN is not None
        error = "teacher: expected finite predictions, got NaN or infinite ones"
        return FloatingPointError(error), ~torch.isfinite(self._lse_GN).all()

    def difference(self, online: OnlineSums, gather: Gather) -> list[Tensor]:
        return [p - t for p, t in (mean.chunk(2, dim=1) for mean in online.means())]

    def tile(self, block: Block, z_GNv: Tensor, lse_GN: Tensor, into: Into) -> Tensor:
        passes = implementation("vocabulary", z_GNv)
        teacher_z_GNv = self._logits(block)
        return passes.softmax_difference(z_GNv, lse_GN, into, teacher_z_GNv, self._lse_GN)

    def _logits(self, block: Block) -> Tensor:
        if self._logits_GNV is not None:
            return block.select(self._logits_GNV)
        assert self._hidden_GND is not None and self._head_VD is not None
        return block.project(self._hidden_GND, self._head_VD)
