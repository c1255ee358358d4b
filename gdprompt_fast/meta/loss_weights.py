"""The weights of tokens and contexts in the inner loss."""

from __future__ import annotations

import torch
from torch import Tensor


def context_weights(batch_group: Tensor, groups: int, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the inner loss: of each context in its group's mean [C], and of each position t in
    its context's mean over the tokens t+1 it predicts [C, Tc] (the last position predicts none).
    """
    per_group = torch.bincount(batch_group, minlength=groups)
    predicts = torch.zeros_like(loss_mask, dtype=torch.float64)
    predicts[:, :-1] = loss_mask[:, 1:].double()
    return 1.0 / per_group[batch_group].double(), predicts / predicts.sum(1, keepdim=True)
