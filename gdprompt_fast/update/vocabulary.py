"""The head, and the token embedding where the two are tied: the update stays in the context's final
states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.handle import weight_handle
from ..ops.rate import Rate
from ..ops.vocabulary import Target, Vocabulary, context_loss, response_loss, tied_lookup
from ..rows import GroupedRows
from .adapted_layer import FactoredLayer, LayerChange, StepState, outer_gradient
from .change import WeightChange
from .embedding import add_rows, check_embedding, lookup_scale, rows_of_ids, scaled


class AdaptedVocabulary(FactoredLayer):
    """The head as losses and logits, and (:meth:`forward`) the tied embedding's lookup."""

    def __init__(
        self, head: nn.Linear, embedding: Any, inner: bool, state: StepState, rate: Rate
    ) -> None:
        if embedding is not None:
            check_embedding(embedding)
        self.lookup_scale = 1.0 if embedding is None else lookup_scale(embedding)
        gradient = outer_gradient(head.weight)
        self.vocabulary = Vocabulary(
            state.cast(head.weight.detach()),
            padding_idx=None if embedding is None else embedding.padding_idx,
            inner=inner,
            rate=rate,
            phase=state.phase,
            gradient=gradient,
        )
        handle = weight_handle((head.weight, gradient), rate.moving(inner))
        super().__init__(state, rate, handle, inner)

    def factor_tensors(self) -> list[Tensor]:
        """Of the lookups; those of the head are the final states, which the loss keeps."""
        lookups = [step.lookup_GSD for step in self.vocabulary.steps]
        return [e_GSD for e_GSD in lookups if e_GSD is not None]

    def release(self) -> None:
        super().release()
        for kept in (self.vocabulary.steps, self.vocabulary.uses, self.vocabulary.lookups):
            kept.clear()
        self.vocabulary.response = None

    @torch.no_grad()
    def change(self, group: int) -> LayerChange:
        """−η Σ_k B_kᵀ A_k, B_k made again, and of the lookups −η Σ_k onehot(c)ᵀ E_k."""
        own = self.vocabulary.of_group(group)
        change, level = WeightChange(*own.weight_VD.shape), own.terms(self.state.level)
        eta = own.rate.eta_G[0]
        for k, step in enumerate(own.steps[:level]):
            a_SD = -eta * step.a_GSD[0]
            blocks_Sv = self._differences(own, k)
            if change.holds(change.rank + len(a_SD)):
                change.add(torch.cat([*blocks_Sv], dim=1), a_SD)
            else:
                change.add_dense(torch.cat([b_Sv.T.to(a_SD.dtype) @ a_SD for b_Sv in blocks_Sv]))
        if (lookup_GSD := own.lookup_sum(level)) is not None:
            assert own.context_ids_GS is not None
            add_rows(change, own.context_ids_GS[0], -eta * lookup_GSD[0])
        return LayerChange(change)

    @staticmethod
    def _differences(own: Vocabulary, k: int) -> Iterator[Tensor]:
        """B_k [S, v] of the only group, a block of the vocabulary after the other."""
        assert own.context_ids_GS is not None
        for block in own.blocks(own.context_ids_GS.numel()):
            yield own.differences(block, range(k + 1))[k][0]

    def forward(self, *inputs: Tensor) -> Tensor:
        (ids,) = inputs
        ids = rows_of_ids(ids, len(self.state.rows))
        y = tied_lookup(ids, self.handle, self.vocabulary, self.state.rows, self.state.level)
        return scaled(y, self.lookup_scale)

    def context_loss(self, hidden_CTD: Tensor, weight_CT: Tensor) -> Tensor:
        """Weighted next-token NLL of every context, [C]."""
        return context_loss(hidden_CTD, weight_CT, self.handle, self.vocabulary, self.state.level)

    def response_loss(self, hidden_RD: Tensor, target: Target, rows: GroupedRows) -> Tensor:
        """KL(target ‖ student) of every response token, [R]."""
        loss_R = response_loss(
            hidden_RD, target, self.handle, self.vocabulary, rows, self.state.level
        )
        if (failure := target.failure()) is not None:
            self.state.flag(*failure)
        return loss_R

    @torch.no_grad()
    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """All logits [B, T, V], for inference."""
        rows, vocabulary = self.state.rows, self.vocabulary
        h_GND = rows.tokens_to_groups(hidden_BTD)
        projection = vocabulary.project(h_GND, self.state.level)
        terms = range(vocabulary.terms(self.state.level))
        out = h_GND.new_empty(*h_GND.shape[:2], len(vocabulary.weight_VD))
        for block in vocabulary.blocks(h_GND.shape[0] * h_GND.shape[1]):
            b = vocabulary.differences(block, terms)
            out[..., block.start : block.stop] = vocabulary.logits(block, projection, b)
        return rows.tokens_from_groups(out, hidden_BTD.shape[1:-1])
