"""Parameter-free parts of a model, computed by ops that keep less for the backward passes.

A part is replaced only where it is what its class says (``intact.py``), with all that the
replacement leaves out: elsewhere the model runs its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.families import FAMILIES, Family, type_name
from ..models.intact import is_intact, is_shipped
from ..ops.attention import attention
from ..ops.gelu import gelu
from ..ops.rotary import rotary
from ..ops.swiglu import swiglu
from .adapted_layer import AdaptedLayer
from .linear import alike, linears
from .masks import causal_window, check_attention_options

Forward = Callable[..., Any]

_GELUS = {  # the form of Φ of each, with the very constants of the op
    "transformers.activations.GELUActivation": "none",
    "transformers.activations.GELUTanh": "tanh",
    "transformers.activations.NewGELUActivation": "tanh",
    "transformers.activations.AccurateGELUActivation": "tanh",
}
_SILUS = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")
_ATTENTIONS = {family.named(family.attention): family for family in FAMILIES if family.attention}
_GATED_MLPS = {family.named(family.gated_mlp) for family in FAMILIES if family.gated_mlp}
_POSITION_TABLES = {f.named(f.position_table) for f in FAMILIES if f.position_table}


def substitute_for(
    module: Any,
    dtype: torch.dtype | None,
    engine_attention: bool = True,
    adapted_layers: Mapping[nn.Module, AdaptedLayer] | None = None,
) -> Forward | None:
    """The forward to use in place of the module's own, if there is a better one.

    Args:
        dtype: of the products under mixed precision, or None.
        engine_attention: the masks are the engine's own (``masks.py``).
        adapted_layers: of the model's layers.
    """
    name = type_name(module)
    if not is_shipped(type(module).forward, type(module)):
        return None
    if name in _GATED_MLPS:
        return _gated_mlp(module, adapted_layers or {})
    if name in _GELUS:
        return lambda x: gelu(x, _GELUS[name])
    if name in _ATTENTIONS and engine_attention:
        return _attention(module, _ATTENTIONS[name], adapted_layers or {})
    if name == "peft.tuners.lora.layer.Linear":
        return _lora(module, dtype)
    return positions_in(module, dtype)


def positions_in(module: Any, dtype: torch.dtype | None) -> Forward | None:
    """The forward of a table of positions whose result is in ``dtype``: a buffer in fp32 would
    make all hidden states fp32.
    """
    if dtype is None or type_name(module) not in _POSITION_TABLES:
        return None
    own = module.forward
    return lambda *args, **options: own(*args, **options).to(dtype)


def _together(
    modules: Sequence[nn.Module], adapted_layers: Mapping[nn.Module, AdaptedLayer]
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Modules at the same input, as one product of several layers where they are just linear."""
    own = [adapted_layers.get(module) for module in modules]
    if alike(own) and all(is_intact(module) for module in modules):
        return lambda x: linears(own, x)  # type: ignore[arg-type]
    return lambda x: tuple(module(x) for module in modules)


def _gated_mlp(mlp: Any, adapted_layers: Mapping[nn.Module, AdaptedLayer]) -> Forward | None:
    """down(silu(gate(x)) ∘ up(x)) of an MLP with an activation that is just that."""
    if type_name(mlp.act_fn) not in _SILUS or not is_intact(mlp.act_fn):
        return None
    gate_and_up = _together([mlp.gate_proj, mlp.up_proj], adapted_layers)
    return lambda x: mlp.down_proj(swiglu(*gate_and_up(x)))


def _attention(
    module: Any, family: Family, adapted_layers: Mapping[nn.Module, AdaptedLayer]
) -> Forward | None:
    """o(softmax attention of q, k, v), q and k turned by their positions where those are rotary;
    None where the modeling file would call other functions than its own.
    """
    file = sys.modules[type(module).__module__]
    if not all(is_shipped(getattr(file, each), type(module)) for each in family.functions):
        return None
    project = _PROJECTIONS[family.qkv](module, family.head_norms, adapted_layers)
    out_projection = getattr(module, family.out_projection)

    def forward(
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        check_attention_options(module, options)
        q, k, v = project(hidden_states)
        if family.rotary:
            assert position_embeddings is not None
            q, k = rotary(q, k, *position_embeddings)
        window = causal_window(attention_mask)
        out = attention(q, k, v, scale=module.scaling, window=window)
        return out_projection(out.flatten(-2)), None

    return forward


QKV = tuple[Tensor, Tensor, Tensor]


def _separate(
    module: Any, head_norms: bool, adapted_layers: Mapping[nn.Module, AdaptedLayer]
) -> Callable[[Tensor], QKV]:
    """Queries [B, H, T, D], keys and values [B, K, T, D] of a layer each."""
    products = _together([module.q_proj, module.k_proj, module.v_proj], adapted_layers)

    def project(x_BTD: Tensor) -> QKV:
        heads = (*x_BTD.shape[:-1], -1, module.head_dim)
        q, k, v = (each.view(heads) for each in products(x_BTD))
        if head_norms:
            q, k = module.q_norm(q), module.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    return project


def _fused(module: Any, *_: Any) -> Callable[[Tensor], QKV]:
    """Queries, keys and values [B, H, T, D] of one layer, a head after the other."""

    def project(x_BTD: Tensor) -> QKV:
        heads = (*x_BTD.shape[:-1], -1, 3 * module.head_size)
        q, k, v = module.query_key_value(x_BTD).view(heads).transpose(1, 2).chunk(3, dim=-1)
        return q, k, v

    return project


_PROJECTIONS = {"separate": _separate, "fused": _fused}


def _lora(layer: Any, dtype: torch.dtype | None) -> Forward | None:
    """y = W x + B (s A x) of a PEFT layer, which itself scales B A x: a tensor as large as y, kept
    in the inner backward beside y's own cotangent. None where the layer does anything else.

    Under mixed precision the adapters read what the layer reads; otherwise in their own dtype.
    """
    if layer.disable_adapters:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    adapters = [(layer.lora_A[n], layer.lora_B[n], layer.scaling[n]) for n in names]
    # A bias would be scaled too; a hook sees B A x before it is scaled.
    if not all(_is_plain(each) for a, b, _ in adapters for each in (a, b)):
        return None
    if not all(_drops_nothing(layer.lora_dropout[name]) for name in names):
        return None

    def forward(x: Tensor) -> Tensor:
        y = base = layer.base_layer(x)
        for lora_a, lora_b, scaling in adapters:
            own = x if dtype is not None else x.to(lora_a.weight.dtype)
            y = y + lora_b(lora_a(own) * scaling)
        return y.to(base.dtype)

    return forward


def _is_plain(linear: Any) -> bool:
    """Whether a module is x ↦ W x and no more."""
    return type(linear) is nn.Linear and linear.bias is None and is_intact(linear)


def _drops_nothing(dropout: nn.Module) -> bool:
    """Whether a module is x ↦ x: active dropout is refused before (``check_deterministic``)."""
    return type(dropout) in (nn.Identity, nn.Dropout) and is_intact(dropout)
