"""θ' as a PEFT LoRA adapter of the base model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..models.architecture import causal_lm
from ..update.change import LowRank
from .layers import ChangedLayer

PREFIX, WEIGHTS_FILE = "base_model.model.", "adapter_model.safetensors"
# What vLLM has room for, and so what its servers are started with.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass
class Adapter:
    """An adapter's tensors by PEFT's names, and what its configuration has to say.

    Attributes:
        low_rank: of every layer that gets B A, by its name in the base model.
        whole: the layers that get a copy at θ' (modules_to_save).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    transposed: bool = False

    @property
    def rank(self) -> int:
        """The largest of a layer."""
        return max(each.rank for each in self.low_rank.values())


def as_adapter(
    layers: Iterable[ChangedLayer], model: nn.Module, rank: int | None, for_vllm: bool
) -> Adapter:
    """B A of every linear layer, of the head and of an embedding of its own; copies of all else:
    norms, layers with biases that move, and an embedding tied to its head (PEFT would merge what
    the two gain into the one weight twice).

    Raises:
        UserError: for what a LoRA server does not take, with ``for_vllm``; where PEFT has no place
            for an update.
    """
    base, adapter = causal_lm(model), Adapter()
    tokens, head = base.get_input_embeddings(), base.get_output_embeddings()
    for layer in layers:
        tied = layer.module is tokens and tokens.weight is head.weight
        if for_vllm:
            _check_served(layer, layer.module in (tokens, head))
        small = layer.change.weight is None or layer.change.bias is not None
        if small or tied or layer.copied:
            _add_whole(adapter, layer)
        else:
            _add_low_rank(adapter, layer, rank)
    if not adapter.low_rank:
        raise UserError(
            "form: expected 'full' for an update without a linear layer's weight, which PEFT has "
            "no adapter of, got 'lora'"
        )
    return adapter


def _check_served(layer: ChangedLayer, vocabulary: bool) -> None:
    change = layer.change
    if vocabulary or layer.copied or change.weight is None or change.bias is not None:
        raise UserError(
            "for_vllm: expected an inner step that moves the weights of linear layers alone "
            f'(inner_params="linear"), got one that moves {layer.name}, of which no LoRA server '
            "takes an update"
        )


def _add_whole(adapter: Adapter, layer: ChangedLayer) -> None:
    adapter.whole.append(layer.name)
    for name, value in layer.values().items():
        adapter.tensors[f"{PREFIX}{layer.name}.{name}"] = value.contiguous()


def _add_low_rank(adapter: Adapter, layer: ChangedLayer, rank: int | None) -> None:
    assert layer.change.weight is not None
    product = layer.change.weight.low_rank(rank)
    adapter.low_rank[layer.name] = product
    place = f"{PREFIX}{layer.name}"
    if isinstance(layer.module, nn.Embedding):  # of a weight [V, D]: what PEFT calls A is of ids
        adapter.tensors[f"{place}.lora_embedding_A"] = product.b_OR.T.contiguous()
        adapter.tensors[f"{place}.lora_embedding_B"] = product.a_RI.T.contiguous()
        return
    adapter.tensors[f"{place}.lora_A.weight"] = product.a_RI.contiguous()
    adapter.tensors[f"{place}.lora_B.weight"] = product.b_OR.contiguous()
    adapter.transposed |= layer.transposed


def config_of(adapter: Adapter, model: nn.Module) -> Any:
    """PEFT's LoraConfig of an adapter: every layer at its own rank, all scaled by one.

    Raises:
        UserError: if PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("form: expected PEFT to be installed (pip install peft)") from None
    base, rank = causal_lm(model), adapter.rank
    ranks = {n: each.rank for n, each in adapter.low_rank.items() if each.rank != rank}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=sorted(adapter.low_rank),
        modules_to_save=sorted(adapter.whole) or None,
        fan_in_fan_out=adapter.transposed,
        base_model_name_or_path=base.name_or_path or None,
        revision=getattr(base.config, "_commit_hash", None),
        inference_mode=True,
    )
