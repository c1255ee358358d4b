"""Pre-norm decoder layers: every sum with the residual in one pass with the norm that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..models.families import FAMILIES, type_name
from ..models.intact import has_own_forward, is_intact
from .adapted_layer import AdaptedLayer
from .norm import AdaptedNorm

_LAYERS = {family.named(family.decoder_layer) for family in FAMILIES if family.decoder_layer}


def decoder_layers(
    backbone: Any, adapted_layers: Mapping[nn.Module, AdaptedLayer]
) -> dict[nn.Module, Callable[..., Tensor]]:
    """Forwards to use in place of the own ones of a backbone's decoder layers, where a layer and
    its norms are what their classes say.
    """
    if not has_own_forward(backbone):  # the own one calls layers by keywords
        return {}
    layers: list[Any] = [each for each in backbone.modules() if type_name(each) in _LAYERS]
    forwards, ahead = {}, _adapted_norm(getattr(backbone, "norm", None), adapted_layers)
    for layer in reversed(layers):
        norm = _adapted_norm(layer.post_attention_layernorm, adapted_layers)
        if norm is None or not is_intact(layer):  # a hook may change what would be normed ahead
            ahead = None
            continue
        forwards[layer] = _forward(layer, norm, ahead)
        ahead = _adapted_norm(layer.input_layernorm, adapted_layers)
    return forwards


def _adapted_norm(
    norm: nn.Module | None, adapted_layers: Mapping[nn.Module, AdaptedLayer]
) -> AdaptedNorm | None:
    adapted_layer = None if norm is None or not is_intact(norm) else adapted_layers.get(norm)
    return adapted_layer if isinstance(adapted_layer, AdaptedNorm) else None


def _forward(layer: Any, norm: AdaptedNorm, ahead: AdaptedNorm | None) -> Callable[..., Tensor]:
    """h = x + attention(norm(x)), then h + mlp(norm(h)); ``ahead`` norms that for who reads it."""

    def forward(hidden_states: Tensor, **options: Any) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
        h, normed = norm.add_forward(attended, hidden_states)
        out: Tensor = layer.mlp(normed)
        return h + out if ahead is None else ahead.add_ahead(out, h)

    return forward
