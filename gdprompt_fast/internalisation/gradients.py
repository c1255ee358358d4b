"""Inner products of texts' gradients from the engine's factors: no gradient is ever formed.

A text's gradient of a weight used as y = x Wᵀ is Eᵀ X, the cotangents E of the outputs times the
inputs X at its tokens. So for texts i and j

    ⟨g_i, g_j⟩ = Σ_layers Σ_{s,t} (e_is · e_jt) (x_is · x_jt)

with (e_is · e_jt) alone for a bias. A lookup's X is the embedding's rows, its E one-hot; where head
and embedding are one weight, the rows of both roles stand below one another, so that their cross
terms count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..meta.inner import inner_step
from ..update.adapted_layer import AdaptedLayer, MaterialisedLayer
from ..update.change import wide
from ..update.embedding import AdaptedEmbedding
from ..update.linear import AdaptedLinear
from ..update.vocabulary import AdaptedVocabulary

# Small parameters are kept as θ − η g: with so large an η their difference from θ is g to rounding.
ETA = 2.0**16


@dataclass(frozen=True)
class Alignment:
    """What is between gradients i and j, from their Gram matrix.

    Attributes:
        gram: ⟨g_i, g_j⟩, [G, G].
    """

    gram: Tensor

    @property
    def squared_norms(self) -> Tensor:
        """‖g_i‖², [G]."""
        return self.gram.diagonal()

    @property
    def distances(self) -> Tensor:
        """‖g_i − g_j‖ = √(‖g_i‖² + ‖g_j‖² − 2 ⟨g_i, g_j⟩), [G, G]."""
        own = self.squared_norms
        return (own[:, None] + own - 2 * self.gram).clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """⟨g_i, g_j⟩ / (‖g_i‖ ‖g_j‖), [G, G]."""
        own = self.squared_norms.sqrt()
        return self.gram / (own[:, None] * own)

    @property
    def variance(self) -> float:
        """The mean of ‖g_i − ḡ‖², which is that of ‖g_i‖² less ‖ḡ‖²."""
        return float(self.squared_norms.mean() - self.gram.mean())


def alignment(model: nn.Module, ids: Tensor, mask: Tensor) -> Alignment:
    """The Gram matrix of the gradients of G texts: of each one's mean next-token NLL, with respect
    to all parameters.

    Time grows with the square of the number of tokens of all texts together, memory with their
    number; nothing has the size of the parameters.

    Args:
        model: as :func:`gdprompt_fast.inner_step` takes it.
        ids: LongTensor [G, T], padded on the right.
        mask: BoolTensor [G, T], True on tokens that are read and predicted.

    Returns:
        In fp32, or in fp64 of a model in fp64.

    Raises:
        UserError: for a bad argument; for a model with layers that have no such factors.
    """
    update = inner_step(model, ids, mask, inner_lr=ETA, verify="never")
    parameters = [*model.parameters()]
    wide_dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    gram = torch.zeros(len(ids), len(ids), dtype=wide_dtype, device=ids.device)
    modules = {layer: module for module, layer in update.adapted.adapted_layers.items()}
    for layer in update.adapted.all_layers:
        gram += _gram_of(layer, modules.get(layer))
    return Alignment(gram)


def _gram_of(layer: AdaptedLayer, module: nn.Module | None) -> Tensor:
    """A layer's share of ⟨g_i, g_j⟩, [G, G]."""
    if isinstance(layer, AdaptedLinear):
        return _of_linear(layer)
    if isinstance(layer, AdaptedVocabulary):
        return _of_vocabulary(layer)
    if isinstance(layer, AdaptedEmbedding):
        return _of_embedding(layer)
    if isinstance(layer, MaterialisedLayer) and module is not None:
        return _of_small(layer, module)
    raise UserError(
        f"model: expected layers whose gradients have factors, got {type(layer).__name__}"
    )


def _of_linear(layer: AdaptedLinear) -> Tensor:
    (factor,) = layer.layer.factors
    left, right = _products(factor.e_GSO), _products(factor.x_GSI)
    return _summed(left * (right + float(layer.layer.inner_bias)), len(factor.e_GSO))


def _of_embedding(layer: AdaptedEmbedding) -> Tensor:
    (factor,) = layer.table.factors
    ids = factor.ids_GS.flatten()
    same = (ids[:, None] == ids) & (ids >= 0)
    return _summed(_products(factor.e_GSD) * same, len(factor.e_GSD))


@torch.no_grad()
def _of_vocabulary(layer: AdaptedVocabulary) -> Tensor:
    """The head's rows, B with the states A; below them, where it is tied, the lookups' rows."""
    head = layer.vocabulary
    (step,) = head.steps
    ids = head.context_ids_GS
    assert ids is not None
    right = wide(step.a_GSD)
    if step.lookup_GSD is not None:
        right = torch.cat([right, wide(step.lookup_GSD)], 1)
    groups, rows = right.shape[:2]
    left = right.new_zeros(groups * rows, groups * rows)
    for block in head.blocks(ids.numel()):
        part = wide(head.differences(block, range(1))[0])
        if step.lookup_GSD is not None:
            columns = torch.arange(block.start, block.stop, device=ids.device)
            part = torch.cat([part, (ids[..., None] == columns).to(part.dtype)], 1)
        flat = part.flatten(0, 1)
        left += flat @ flat.T
    return _summed(left * _products(right), groups)


def _of_small(layer: MaterialisedLayer, module: nn.Module) -> Tensor:
    gram: Tensor | float = 0.0
    for name, moved in zip(layer.names, layer.moved, strict=False):
        gradient = (wide(getattr(module, name).detach()) - moved).flatten(1) / ETA
        gram = gram + gradient @ gradient.T
    assert isinstance(gram, Tensor)
    return gram


def _products(rows_GSD: Tensor) -> Tensor:
    """Every row's inner product with every other, [G S, G S]."""
    flat = wide(rows_GSD).flatten(0, 1)
    return flat @ flat.T


def _summed(products: Tensor, groups: int) -> Tensor:
    """The sums over both texts' rows, [G, G]."""
    rows = len(products) // groups
    return products.view(groups, rows, groups, rows).sum((1, 3))
