"""Embeddings of their own: learned positions, and tokens where the head is not tied to them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import UserError
from ..models.families import SCALED_EMBEDDINGS, type_name
from ..ops.embedding import InnerEmbedding, inner_embedding
from ..ops.handle import weight_handle
from ..ops.rate import Rate
from .adapted_layer import (
    AdaptedLayer,
    FactoredLayer,
    LayerChange,
    StepState,
    outer_gradient,
    rule_for,
)
from .change import WeightChange


def check_embedding(module: Any) -> None:
    """Only the plain lookup has the gradient of our rules."""
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            raise UserError(f"model: expected embeddings without {option}, got {module}")


def lookup_scale(module: Any) -> float:
    """What a class of a family's own multiplies a lookup by."""
    return float(module.embed_scale) if type_name(module) in SCALED_EMBEDDINGS else 1.0


def scaled(y: Tensor, scale: float) -> Tensor:
    """A lookup times its scale: autograd's product, so what lies below gets scale · ȳ."""
    return y if scale == 1.0 else y * scale


def rows_of_ids(ids: Tensor, rows: int) -> Tensor:
    """Ids shared by all rows ([1, T], as positions are) repeated for each."""
    return ids.expand(rows, -1) if len(ids) == 1 else ids


def add_rows(change: WeightChange, ids_S: Tensor, e_SD: Tensor) -> None:
    """ΔW[ids] += e, once for each id: rows that are one-hot, [V, D] in all."""
    seen = ids_S >= 0  # not in unused places
    ids_U, which = ids_S[seen].unique(return_inverse=True)
    sum_UD = e_SD.new_zeros(len(ids_U), e_SD.shape[1]).index_add_(0, which, e_SD[seen])
    if change.holds(change.rank + len(ids_U)):
        one_hot_UV = sum_UD.new_zeros(len(ids_U), change.outputs)
        change.add(one_hot_UV.scatter_(1, ids_U[:, None], 1.0), sum_UD)
    else:
        dense_VD = sum_UD.new_zeros(change.outputs, change.inputs)
        change.add_dense(dense_VD.index_copy_(0, ids_U, sum_UD))


class AdaptedEmbedding(FactoredLayer):
    def __init__(self, module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> None:
        check_embedding(module)
        self.scale = lookup_scale(module)
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

    def change(self, group: int) -> LayerChange:
        """−η Σ_t onehot(c_t)ᵀ e_t of every inner step."""
        change, eta = WeightChange(*self.table.weight_VD.shape), self.rate.eta_G[group]
        for factor in self.table.factors[: self.state.level]:
            add_rows(change, factor.ids_GS[group], -eta * factor.e_GSD[group])
        return LayerChange(change)

    def forward(self, *inputs: Tensor) -> Tensor:
        (ids,) = inputs
        ids = rows_of_ids(ids, len(self.state.rows))
        y = inner_embedding(ids, self.handle, self.table, self.state.rows, self.state.level)
        return scaled(y, self.scale)


@rule_for("torch.nn.modules.sparse.Embedding", *SCALED_EMBEDDINGS)
def embedding(module: Any, inner: dict[str, bool], state: StepState, rate: Rate) -> AdaptedLayer:
    return AdaptedEmbedding(module, inner, state, rate)
