"""The transformer blocks of a model, and what in them fine-tuning moves: keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..keep.layers import is_transposed
from ..models.architecture import backbone_and_head, causal_lm, check_deterministic
from ..models.families import Family, family_of, type_name
from ..models.inner_params import LINEAR_LAYERS


def check_plain(model: nn.Module) -> None:
    """The model is a causal LM of a family the engine knows, without adapters and dropout.

    Raises:
        UserError: naming what it is, or has, instead.
    """
    if causal_lm(model) is not model:
        raise UserError(
            "model: expected a causal LM without adapters (merge them into it first), got "
            f"{type_name(model)}"
        )
    backbone_and_head(model)
    check_deterministic(model)


def known_family(model: nn.Module) -> Family:
    """The family of a causal LM that :func:`check_plain` accepts."""
    family = family_of(model)
    assert family is not None
    return family


def blocks_of(model: Any) -> list[nn.Module]:
    """The transformer blocks, from the embeddings up."""
    return list(getattr(model.base_model, known_family(model).blocks))


def attentions_of(model: Any) -> list[Any]:
    """The self-attention of every block."""
    place = known_family(model).self_attention
    return [getattr(block, place) for block in blocks_of(model)]


def final_norm_of(model: Any) -> nn.Module:
    """The norm between the last block and the head."""
    norm: nn.Module = getattr(model.base_model, known_family(model).final_norm)
    return norm


@dataclass(frozen=True)
class KeysOrValues:
    """The rows of a layer's weight [O, I] and bias [O] that make keys, values, or both.

    Args:
        layer: the linear layer y = x Wᵀ + b, or GPT-2's Conv1D, whose weight is stored as Wᵀ.
        rows: of W that make them, [R]; None for all.
    """

    layer: Any
    rows: Tensor | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if there is one."""
        return [each for each in (self.layer.weight, self.layer.bias) if each is not None]

    @property
    def outputs(self) -> int:
        """O."""
        return int(self.layer.weight.shape[1 if self.transposed else 0])

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [I, O]."""
        return is_transposed(self.layer)

    def only_rows(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients of :attr:`parameters` without those of other rows: zero there."""
        rows = self.rows
        if rows is None:
            return gradients
        dims = [1 if self.transposed and gradient.dim() == 2 else 0 for gradient in gradients]
        return [
            torch.zeros_like(gradient).index_copy_(dim, rows, gradient.index_select(dim, rows))
            for gradient, dim in zip(gradients, dims, strict=True)
        ]

    def among_all(self, y: Tensor) -> Tensor:
        """Outputs [..., R] at their places among all of the layer's, [..., O]; zero elsewhere."""
        if self.rows is None:
            return y
        whole = y.new_zeros(*y.shape[:-1], self.outputs)
        return whole.index_copy_(-1, self.rows, y)


def keys_and_values(model: nn.Module) -> list[list[KeysOrValues]]:
    """What makes the keys and values of every block: layers of their own (``k_proj``, ``v_proj``),
    or the rows of one that makes queries too.

    Raises:
        UserError: for layers of other types than the family's.
    """
    of_blocks = [_LAYERS[_projections(each)](each) for each in attentions_of(model)]
    for each in (each for of_block in of_blocks for each in of_block):
        if type_name(each.layer) not in LINEAR_LAYERS:
            raise UserError(
                "model: expected keys and values from plain linear layers, got "
                f"{type_name(each.layer)}"
            )
    return of_blocks


def _projections(attention: nn.Module) -> str:
    return next(name for name in _LAYERS if hasattr(attention, name))


def _separate(attention: Any) -> list[KeysOrValues]:
    return [KeysOrValues(attention.k_proj), KeysOrValues(attention.v_proj)]


def _a_third_after_the_other(attention: Any) -> list[KeysOrValues]:
    """All queries, then all keys, then all values."""
    width, layer = attention.embed_dim, attention.c_attn
    return [KeysOrValues(layer, torch.arange(width, 3 * width, device=layer.weight.device))]


def _a_head_after_the_other(attention: Any) -> list[KeysOrValues]:
    """Query, key and value of one head, then of the next."""
    size, layer = attention.head_size, attention.query_key_value
    rows = torch.arange(len(layer.weight), device=layer.weight.device)
    return [KeysOrValues(layer, rows[rows % (3 * size) >= size])]


_LAYERS: dict[str, Callable[[Any], list[KeysOrValues]]] = {
    "k_proj": _separate,
    "c_attn": _a_third_after_the_other,
    "query_key_value": _a_head_after_the_other,
}


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Removes hooks afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
