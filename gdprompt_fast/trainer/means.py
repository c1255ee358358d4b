"""What is logged of the steps beside the outer loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..meta.config import MetaStepOutput


class StepMeans:
    """Means over the optimizer steps since they were last read.

    Args:
        lm: whether L_LM is part of the outer loss, and so worth a number.
    """

    def __init__(self, lm: bool) -> None:
        self._lm = lm
        self._sums: Tensor | float = 0.0
        self._steps = 0

    @staticmethod
    def of(out: MetaStepOutput, share: float) -> Tensor:
        """The outer, query, LM and inner loss of a part of a step, as its shares of the whole's.

        Args:
            share: of the whole's contexts.
        """
        losses = out.outer_loss, out.query_loss, out.lm_loss, share * out.inner_loss
        return torch.stack(losses)

    def add(self, losses: Tensor, ends_step: bool) -> None:
        """Counts the shares of a part, on all processes together."""
        self._sums = self._sums + losses
        self._steps += ends_step

    def read(self) -> dict[str, float]:
        """The means; from here on they begin anew."""
        if not isinstance(self._sums, Tensor) or not self._steps:
            return {}
        _, query, lm, inner = (self._sums / self._steps).tolist()
        self._sums, self._steps = 0.0, 0
        parts = {"query_loss": query, "lm_loss": lm} if self._lm else {}
        return {**parts, "inner_loss": inner}
