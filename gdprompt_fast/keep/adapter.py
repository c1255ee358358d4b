"""θ' as a PEFT LoRA adapter of the base model.

Every linear layer, the head and an embedding of its own get B A of their own rank, scaled by one.
All else is copied at θ' (PEFT's modules_to_save): norms; layers whose bias moves, as PEFT has no
place for a bias that is merged and taken off again on every layer; and an embedding tied to its
head, as PEFT would merge what the two gain into their one weight twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..models.architecture import causal_lm
from ..update.change import LowRank
from .layers import ChangedLayer

PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# What vLLM can be told to make room for (--max-lora-rank).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Adapter:
    """An adapter before it is written.

    Attributes:
        low_rank: the layers that get B A, and that; by their names in the base model.
        whole: the layers that get a copy at θ', and its parameters.
    """

    low_rank: Mapping[str, tuple[ChangedLayer, LowRank]]
    whole: Mapping[str, Mapping[str, Tensor]]

    @property
    def rank(self) -> int:
        """The largest of a layer."""
        return max(product.rank for _, product in self.low_rank.values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by PEFT's names for them."""
        found: dict[str, Tensor] = {}
        for name, values in self.whole.items():
            found |= {f"{PREFIX}{name}.{key}": value for key, value in values.items()}
        for name, (layer, product) in self.low_rank.items():
            a, b = f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"
            found |= {a: product.a_RI, b: product.b_OR}
            if isinstance(layer.module, nn.Embedding):  # [V, D]: PEFT's A is of the ids
                del found[a], found[b]
                found[f"{PREFIX}{name}.lora_embedding_A"] = product.b_OR.T
                found[f"{PREFIX}{name}.lora_embedding_B"] = product.a_RI.T
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def config(self, model: nn.Module) -> dict[str, Any]:
        """What PEFT's LoraConfig says of the adapter."""
        base, rank = causal_lm(model), self.rank
        others = {name: product.rank for name, (_, product) in sorted(self.low_rank.items())}
        ranks = {name: own for name, own in others.items() if own != rank}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.name_or_path or None,
            "revision": getattr(base.config, "_commit_hash", None),
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
            "target_modules": _shortened(self.low_rank, base),
            "modules_to_save": sorted(self.whole) or None,
            "fan_in_fan_out": any(layer.transposed for layer, _ in self.low_rank.values()),
            "lora_dropout": 0.0,
            "bias": "none",
        }


def as_adapter(
    layers: Iterable[ChangedLayer], model: nn.Module, rank: int | None, for_vllm: bool
) -> Adapter:
    """The adapter of the layers that θ' changes.

    Args:
        rank: the highest; None: what each layer's change has.
        for_vllm: all layers get one rank of ``VLLM_RANKS``, filled up with zeros.

    Raises:
        UserError: for what a server of LoRA adapters does not take, with ``for_vllm``; for an
            update without a linear layer's weight.
    """
    base = causal_lm(model)
    tokens, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = tokens if tokens.weight is head.weight else None
    if for_vllm:
        rank = VLLM_RANKS[-1] if rank is None else _served_rank(rank)
    low_rank: dict[str, tuple[ChangedLayer, LowRank]] = {}
    whole: dict[str, Mapping[str, Tensor]] = {}
    for layer in layers:
        weight, bias = layer.change.weight, layer.change.bias
        alone = weight is not None and bias is None and not layer.copied
        if for_vllm and (not alone or layer.module in (tokens, head)):
            raise _not_served(layer)
        if alone and layer.module is not tied:
            assert weight is not None
            low_rank[layer.name] = layer, weight.low_rank(rank)
        else:
            whole[layer.name] = layer.values()
    if not low_rank:
        raise UserError(
            'form: expected "full" for an update that changes no linear layer\'s weight alone, of '
            'which PEFT has no adapter, got "lora"'
        )
    adapter = Adapter(low_rank, whole)
    if for_vllm:
        one = _served_rank(adapter.rank)
        return Adapter({n: (layer, own.padded(one)) for n, (layer, own) in low_rank.items()}, whole)
    return adapter


def check_rank(rank: Any, for_vllm: bool) -> None:
    """
    Raises:
        UserError: for a rank that an adapter cannot have.
    """
    most = VLLM_RANKS[-1]
    if rank is not None and (type(rank) is not int or rank < 1 or (for_vllm and rank > most)):
        limit = f" <= {most}" if for_vllm else ""
        raise UserError(f"rank: expected an integer >= 1{limit} or None, got {rank!r}")


def _served_rank(rank: int) -> int:
    """The next rank that vLLM has room for."""
    return next(each for each in VLLM_RANKS if each >= rank)


def _not_served(layer: ChangedLayer) -> UserError:
    return UserError(
        "for_vllm: expected an inner step that moves linear layers' weights alone "
        f'(inner_params="linear"), got one that moves {layer.name}, where a server takes no update'
    )


def _shortened(names: Iterable[str], base: nn.Module) -> list[str]:
    """Names of layers by their last part, as ``q_proj``, where that names these layers alone."""
    given = set(names)
    every = {name for name, module in base.named_modules()}
    every = {name.removesuffix(".base_layer") for name in every}
    short = {name.rpartition(".")[2] for name in given}
    named = {name for name in every if name.rpartition(".")[2] in short}
    return sorted(short if named == given else given)
