"""Folders of θ': an adapter, or a whole model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..artifacts.files import is_empty, write_file, write_folder, write_json
from ..errors import UserError
from ..models.architecture import causal_lm
from ..models.families import type_name
from ..update.attach import AdaptedModel
from .adapter import CONFIG_FILE, WEIGHTS_FILE, as_adapter, check_rank
from .card import card, discarded_of, summary, table
from .layers import OF_PEFT, WRAPPERS, changed_layers
from .record import Learnt, write_record
from .state import own_state

FORMS = ("lora", "full")


@dataclass(frozen=True)
class Kept:
    """What a folder holds of θ'.

    Attributes:
        folder: where it is.
        form: ``"lora"`` or ``"full"``.
        ranks: of every layer with B A, by its name in the base model.
        discarded: the share of ‖ΔW‖² that B A has not, likewise.
        whole: the layers copied at θ'.
    """

    folder: Path
    form: str
    ranks: dict[str, int] = field(default_factory=dict)
    discarded: dict[str, float] = field(default_factory=dict)
    whole: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """What it is, in a line."""
        if self.form == "full":
            return f"{self.folder}: the whole model"
        return f"{self.folder}: {summary(self.ranks, self.discarded)}"

    def __str__(self) -> str:
        exact = not any(self.discarded.values())
        return self.line if exact else f"{self.line}\n\n{table(self.ranks, self.discarded)}"


def check_keeping(folder: Path, form: Any, rank: Any, for_vllm: bool) -> None:
    """
    Raises:
        UserError: naming the argument, what was expected and what was given.
    """
    if form not in FORMS:
        raise UserError(f'form: expected "lora" or "full", got {form!r}')
    if form == "full" and (rank is not None or for_vllm):
        name = "rank" if rank is not None else "for_vllm"
        raise UserError(f'{name}: expected none with form "full", which has no rank')
    check_rank(rank, for_vllm)
    if not is_empty(folder):
        raise UserError(f"folder: expected a new or empty folder, got {folder}")


def save(
    adapted: AdaptedModel,
    folder: Path,
    group: int,
    learnt: Learnt,
    *,
    form: str = "lora",
    rank: int | None = None,
    for_vllm: bool = False,
    tokenizer: Any = None,
) -> Kept:
    """Writes θ' of a group to a new folder, whole or not at all.

    Args:
        tokenizer: to be there too.

    Raises:
        UserError: naming the argument, what was expected and what was given.
    """
    check_keeping(folder, form, rank, for_vllm)
    if form == "full":
        model = whole_model(adapted, group)

        def write_model(temporary: Path) -> None:
            model.save_pretrained(str(temporary))
            write_record(temporary, learnt, {"form": form})
            if tokenizer is not None:
                tokenizer.save_pretrained(str(temporary))

        write_folder(folder, write_model)
        return Kept(folder, form)
    adapter = as_adapter(changed_layers(adapted, group), adapted.model, rank, for_vllm)
    config, discarded = adapter.config(adapted.model), discarded_of(adapter)

    def write(temporary: Path) -> None:
        save_file(adapter.tensors(), temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(temporary / CONFIG_FILE, config)
        write_file(temporary / "README.md", card(adapter, learnt, config))
        ranks = {name: product.rank for name, (_, product) in adapter.low_rank.items()}
        write_record(temporary, learnt, {"form": form, "ranks": ranks, "discarded": discarded})

    write_folder(folder, write)
    ranks = {name: product.rank for name, (_, product) in adapter.low_rank.items()}
    return Kept(folder, form, ranks, discarded, tuple(adapter.whole))


def whole_model(adapted: AdaptedModel, group: int) -> Any:
    """The base model at θ' of a group, with its adapters in its weights.

    Raises:
        UserError: if some of its layers are not those that its config makes.
    """
    base = causal_lm(adapted.model)
    state = {}
    for path, tensor in own_state(base).items():
        place, _, name = path.rpartition(".")
        if not OF_PEFT.search(place):
            state[f"{WRAPPERS.sub('', place)}.{name}"] = tensor.detach()
    for layer in changed_layers(adapted, group):
        state |= {f"{layer.name}.{name}": value for name, value in layer.values().items()}
    with torch.device("meta"):
        model: Any = type(base)(base.config)
    _check_same_layers(base, model)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = base.generation_config
    return model


def _check_same_layers(base: nn.Module, made: nn.Module) -> None:
    """A folder has weights and a config: what was put in by hand would not come back."""
    expected = {name: type(module) for name, module in made.named_modules()}
    for path, module in base.named_modules():
        name = WRAPPERS.sub("", path)
        wraps = hasattr(module, "base_layer") or hasattr(module, "modules_to_save")
        if wraps or OF_PEFT.search(path) or expected.get(name, type(module)) is type(module):
            continue
        raise UserError(
            f'form: expected "full" of layers that the config makes, got a {type_name(module)} for '
            f"the {expected[name].__name__} of {name}; to_state_dict() has its tensors"
        )
