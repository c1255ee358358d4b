"""Pre-norm decoder layers: every sum with the residual in one pass with the norm that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..models.families import FAMILIES, type_name
from ..models.intact import has_own_forward, is_intact
from .norm import NormSite
from .site import Site

_LAYERS = {family.named(family.decoder_layer) for family in FAMILIES if family.decoder_layer}


def decoder_layers(
    backbone: Any, sites: Mapping[nn.Module, Site]
) -> dict[nn.Module, Callable[..., Tensor]]:
    """Forwards to use in place of the own ones of a backbone's decoder layers, where a layer and
    its norms are what their classes say.
    """
    if not has_own_forward(backbone):  # the own one calls layers by keywords
        return {}
    layers: list[Any] = [each for each in backbone.modules() if type_name(each) in _LAYERS]
    forwards, ahead = {}, _norm_site(getattr(backbone, "norm", None), sites)
    for layer in reversed(layers):
        norm = _norm_site(layer.post_attention_layernorm, sites)
        if norm is None or not is_intact(layer):  # a hook may change what would be normed ahead
            ahead = None
            continue
        forwards[layer] = _forward(layer, norm, ahead)
        ahead = _norm_site(layer.input_layernorm, sites)
    return forwards


def _norm_site(norm: nn.Module | None, sites: Mapping[nn.Module, Site]) -> NormSite | None:
    site = None if norm is None or not is_intact(norm) else sites.get(norm)
    return site if isinstance(site, NormSite) else None


def _forward(layer: Any, norm: NormSite, ahead: NormSite | None) -> Callable[..., Tensor]:
    """h = x + attention(norm(x)), then h + mlp(norm(h)); ``ahead`` norms that for who reads it."""

    def forward(hidden_states: Tensor, **options: Any) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
        h, normed = norm.add_forward(attended, hidden_states)
        out: Tensor = layer.mlp(normed)
        return h + out if ahead is None else ahead.add_ahead(out, h)

    return forward
