"""Embeddings of their own: learned positions, and tokens where the head is not tied to them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import UserError
from ..ops.embedding import InnerEmbedding, inner_embedding
from ..ops.handle import weight_handle
from ..ops.rate import Rate
from .adapted_layer import AdaptedLayer, FactoredLayer, StepState, outer_gradient, rule_for


def check_embedding(module: Any) -> None:
    """Only the plain lookup has the gradient of our rules."""
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            raise UserError(f"model: expected embeddings without {option}, got {module}")


def rows_of_ids(ids: Tensor, rows: int) -> Tensor:
    """Ids shared by all rows ([1, T], as positions are) repeated for each."""
    return ids.expand(rows, -1) if len(ids) == 1 else ids


class AdaptedEmbedding(FactoredLayer):
    def __init__(self, module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> None:
        check_embedding(module)
        gradient = outer_gradient(module.weight)
        self.table = InnerEmbedding(
            state.cast(module.weight.detach()),
            module.padding_idx,
            inner=inner["weight"],
            rate=rate,
            phase=state.phase,
            gradient=gradient,
        )
        handle = weight_handle((module.weight, gradient), rate.moving(inner["weight"]))
        super().__init__(state, rate, handle, inner["weight"])

    def factor_tensors(self) -> list[Tensor]:
        return [factor.e_GSD for factor in self.table.factors]

    def release(self) -> None:
        super().release()
        self.table.factors.clear()

    def forward(self, *inputs: Tensor) -> Tensor:
        (ids,) = inputs
        ids = rows_of_ids(ids, len(self.state.rows))
        return inner_embedding(ids, self.handle, self.table, self.state.rows, self.state.level)


@rule_for("torch.nn.modules.sparse.Embedding")
def embedding(module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> AdaptedLayer:
    return AdaptedEmbedding(module, inner, state, rate)
