"""Layers at a θ' of each group that is given, not made by an inner step; for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.rate import Rate
from ..rows import GroupedRows
from .adapted_layer import AdaptedLayer, LayerChange, MaterialisedLayer, StepState
from .change import WeightChange
from .embedding import AdaptedEmbedding, rows_of_ids, scaled
from .linear import AdaptedLinear
from .vocabulary import AdaptedVocabulary


class GroupedChange:
    """W' − W and b' − b of a layer in every group, as B A, with zeros up to the largest rank."""

    def __init__(self, changes: Sequence[LayerChange], weight_OI: Tensor) -> None:
        self.of_group = changes
        none = WeightChange(*weight_OI.shape)
        products = [(each.weight or none).low_rank() for each in changes]
        rank = max(product.rank for product in products)
        like = torch.promote_types(weight_OI.dtype, torch.float32)
        shape = len(changes), rank
        self.b_GRO = weight_OI.new_zeros(*shape, weight_OI.shape[0], dtype=like)
        self.a_GRI = weight_OI.new_zeros(*shape, weight_OI.shape[1], dtype=like)
        for group, product in enumerate(products):
            self.b_GRO[group, : product.rank] = product.b_OR.T
            self.a_GRI[group, : product.rank] = product.a_RI
        biases = [each.bias for each in changes]
        self.bias_G1O = None
        if any(bias is not None for bias in biases):
            zero = self.b_GRO.new_zeros(weight_OI.shape[0])
            self.bias_G1O = torch.stack([zero if b is None else b for b in biases])[:, None]

    def of_inputs(self, x: Tensor, rows: GroupedRows) -> Tensor:
        """x (B A)ᵀ + b' − b with the change of every row's group, [B, …, O]."""
        x_GMI = rows.tokens_to_groups(x).to(self.a_GRI.dtype)
        y_GMO = (x_GMI @ self.a_GRI.transpose(1, 2)) @ self.b_GRO
        if self.bias_G1O is not None:
            y_GMO += self.bias_G1O
        return rows.tokens_from_groups(y_GMO, tuple(x.shape[1:-1])).to(x.dtype)

    def of_ids(self, ids: Tensor, rows: GroupedRows) -> Tensor:
        """The rows of B A at ids [B, T], of a change [V, D] of an embedding."""
        ids_GM = rows.to_groups(ids).flatten(1)
        at_GMR = self.b_GRO.transpose(1, 2).gather(
            1, ids_GM[..., None].expand(-1, -1, self.b_GRO.shape[1])
        )
        return rows.tokens_from_groups(at_GMR @ self.a_GRI, tuple(ids.shape[1:]))


class ChangedLinear(AdaptedLinear):
    def __init__(
        self, module: Any, state: StepState, rate: Rate, changes: Sequence[LayerChange]
    ) -> None:
        transposed = not isinstance(module, nn.Linear)
        super().__init__(module, _nothing(module), state, rate, transposed)
        self.changes, self.moving = GroupedChange(changes, self.layer.weight_OI), 1

    def change(self, group: int) -> LayerChange:
        return self.changes.of_group[group]

    def forward(self, *inputs: Tensor) -> Tensor:
        y = super().forward(*inputs)
        return y + self.changes.of_inputs(inputs[0], self.state.rows).to(y.dtype)


class ChangedEmbedding(AdaptedEmbedding):
    def __init__(
        self, module: Any, state: StepState, rate: Rate, changes: Sequence[LayerChange]
    ) -> None:
        super().__init__(module, _nothing(module), state, rate)
        self.changes, self.moving = GroupedChange(changes, module.weight), 1

    def change(self, group: int) -> LayerChange:
        return self.changes.of_group[group]

    def forward(self, *inputs: Tensor) -> Tensor:
        y, rows = super().forward(*inputs), self.state.rows
        change = self.changes.of_ids(rows_of_ids(inputs[0], len(rows)), rows)
        return y + scaled(change.to(y.dtype), self.scale)


class ChangedVocabulary(AdaptedVocabulary):
    """The head alone: an embedding tied to it has a change of its own."""

    def __init__(
        self, head: nn.Linear, state: StepState, rate: Rate, changes: Sequence[LayerChange]
    ) -> None:
        super().__init__(head, None, False, state, rate)
        self.changes, self.moving = GroupedChange(changes, head.weight), 1

    def change(self, group: int) -> LayerChange:
        return self.changes.of_group[group]

    @torch.no_grad()
    def logits(self, hidden_BTD: Tensor) -> Tensor:
        z = super().logits(hidden_BTD)
        return z + self.changes.of_inputs(hidden_BTD, self.state.rows).to(z.dtype)


def changed_small(layer: MaterialisedLayer, changes: Sequence[LayerChange]) -> AdaptedLayer:
    """A layer whose parameters are each group's own already, at the values given of them."""
    for index, (name, old_G) in enumerate(zip(layer.names, layer.moved, strict=False)):
        own = [each.small.get(name, old) for each, old in zip(changes, old_G, strict=True)]
        layer.tensors[index] = torch.stack([value.to(old_G.dtype) for value in own]).detach()
    return layer


def _nothing(module: nn.Module) -> dict[str, bool]:
    return {name: False for name, _ in module.named_parameters(recurse=False)}
