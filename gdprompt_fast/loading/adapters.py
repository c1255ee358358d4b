"""PEFT adapters: new ones, those of a folder, and the base that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.local_shards import put_rows
from ..distributed.sharded import is_sharded
from ..errors import UserError
from ..models.architecture import check_model
from .files import ADAPTER_WEIGHTS, check_files, read_settings, weight_files
from .find import ADAPTER_CONFIG_FILE, FoundModel, find_model, holds_model
from .weights import LoadedWeights, Shape

LoadBase = Callable[[FoundModel], Any]
Weights = dict[str, Tensor]


def add_lora(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """``model`` with trainable adapters of this rank on every linear layer but the head.

    Raises:
        ValueError: if the rank is not positive, or PEFT is not installed.
    """
    if rank < 1:
        raise UserError(f"lora_rank: expected an integer >= 0, got {rank}")
    if hasattr(model, "peft_config"):
        raise UserError("lora_rank: expected 0 with a model that has adapters already")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("lora_rank: expected PEFT to be installed (pip install peft)") from None
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    commit = getattr(model.config, "_commit_hash", None)
    return get_peft_model(model, config, revision=commit).eval()


def load_adapters(
    folder: Path, load: LoadBase, allow_missing: bool
) -> tuple[nn.Module, FoundModel]:
    """The adapters in a folder on their base, which ``load`` loads; and where that is.

    Raises:
        ValueError: if the base is not found, or the adapters are not LoRA's or not of it.
    """
    try:
        from peft import PeftConfig, PeftModel, PeftModelForCausalLM
    except ImportError:
        raise UserError(
            f"model: expected PEFT to be installed for the adapters in {folder} (pip install peft)"
        ) from None
    check_files(folder, weight_files(folder, ADAPTER_WEIGHTS))
    config, weights = PeftConfig.from_pretrained(str(folder)), _weights(folder)
    kinds: dict[Any, Any] = {None: PeftModel, "CAUSAL_LM": PeftModelForCausalLM}
    if config.task_type not in kinds:
        raise UserError(
            f"model: expected adapters of a causal LM, got task_type {config.task_type!r} in "
            f"{folder / ADAPTER_CONFIG_FILE}"
        )
    found = find_base(folder, config.base_model_name_or_path, config.revision)
    base = load(found)
    _resize_embeddings(base, weights)
    model = kinds[config.task_type].from_pretrained(
        base, str(folder), is_trainable=True, ignore_mismatched_sizes=True, torch_device="cpu"
    )
    check_model(model.eval())
    _compared(model, weights).check(folder, "its adapters", allow_missing)
    model.peft_config["default"].base_model_name_or_path = found.name
    model.peft_config["default"].revision = found.revision
    return model, found


def find_base(folder: Path, name: str | None, revision: str | None) -> FoundModel:
    """The base of the adapters in ``folder``, by its path, from here or from there, or by its name
    on the hub.

    Raises:
        ValueError: naming all that was tried.
    """
    where = folder / ADAPTER_CONFIG_FILE
    if not (name and isinstance(name, str)):
        raise UserError(
            f"model: expected a base_model_name_or_path in {where}, got {name or 'none'}"
        )
    tried, path = _tried(folder, name), _on_disk(folder, name)
    if path is not None:
        if (path / ADAPTER_CONFIG_FILE).is_file():
            raise UserError(f"model: expected a base without adapters in {path}, as {where} says")
        return find_model(path)
    try:
        return find_model(name, revision)
    except UserError as error:
        raise UserError(
            f"model: expected the base of the adapters, base_model_name_or_path in {where}, at "
            f"{' or '.join(map(str, tried))}, got none: {error}"
        ) from error


def base_on_disk(folder: Path) -> Path | None:
    """Where the base of the adapters in ``folder`` is; None if that is not here, or no adapters
    are.
    """
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return None
    name = read_settings(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    return _on_disk(folder, name) if name and isinstance(name, str) else None


def _on_disk(folder: Path, name: str) -> Path | None:
    paths = _tried(folder, name)
    return next((path for path in paths if path.is_file() or holds_model(path)), None)


def _tried(folder: Path, name: str) -> list[Path]:
    """A base's path from here and from its adapters."""
    return [*dict.fromkeys([Path(name).absolute(), (folder / name).absolute()])]


def load_adapter_weights(model: nn.Module, folder: Path) -> None:
    """Puts the adapters in a folder into a model that has such.

    Raises:
        ValueError: if they are not those of the model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    weights = _weights(folder)
    _compared(model, weights).check(folder, "its adapters", allow_missing=False)
    if is_sharded(model):
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        for name, tensor in own.items():
            put_rows(weights[name], tensor)
    else:
        set_peft_model_state_dict(model, weights)


def _weights(folder: Path) -> Weights:
    from peft import load_peft_weights

    return load_peft_weights(str(folder), device="cpu")


def _compared(model: Any, file: Weights) -> LoadedWeights:
    """The adapters of ``model`` against those in a file."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    names = model.get_base_model().state_dict()
    base = {f"base_model.model.{name}" for name in names if ".lora_" not in name}
    differ: list[tuple[str, Shape, Shape]] = [
        (name, file[name].shape, own[name].shape)
        for name in sorted(own.keys() & file.keys())
        if file[name].shape != own[name].shape
    ]
    return LoadedWeights(
        len(own), sorted(own.keys() - file.keys()), sorted(file.keys() - own.keys() - base), differ
    )


def _resize_embeddings(base: Any, file: Weights) -> None:
    """PEFT saves the embeddings with the adapters where tokens were added to the base."""
    for name, weight in file.items():
        added = name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))
        if added and len(weight) != len(base.get_input_embeddings().weight):
            base.resize_token_embeddings(len(weight))
