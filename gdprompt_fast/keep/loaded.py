"""Adapters of a base model as the θ' of groups, one a group, to run the model at all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.architecture import causal_lm
from ..ops.phase import Phase
from ..update.adapted_layer import AdaptedLayer, LayerChange, MaterialisedLayer, StepState
from ..update.attach import AdaptedModel
from ..update.change import WeightChange
from ..update.embedding import AdaptedEmbedding, rows_of_ids
from ..update.linear import AdaptedLinear
from .layers import is_transposed

Tensors = Mapping[str, Tensor]  # of a layer in one adapter, by what PEFT calls them


class GroupedChange:
    """W' − W of every group: B A [G, O, r] and [G, r, I] with zeros up to the largest rank, or
    where a group has the whole weight, [O, I] of that group.
    """

    def __init__(self, changes: Sequence[WeightChange]) -> None:
        self.changes = changes
        products = [change.low_rank() for change in changes]
        rank = max(each.rank for each in products)
        pad = torch.nn.functional.pad
        self.b_GOR = torch.stack([pad(p.b_OR, (0, rank - p.rank)) for p in products])
        self.a_GRI = torch.stack([pad(p.a_RI, (0, 0, 0, rank - p.rank)) for p in products])
