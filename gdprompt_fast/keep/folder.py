"""Folders of θ': an adapter or a whole model."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from ..artifacts.files import is_empty, write_folder
from ..errors import UserError
from ..update.attach import AdaptedModel
from .adapter import WEIGHTS_FILE, Adapter, as_adapter, config_of
from .layers import changed_layers
from .record import Learnt, write_record


def save_adapter(
    adapted: AdaptedModel,
    folder: Path,
    group: int,
    rank: int | None,
    for_vllm: bool,
    learnt: Learnt,
) -> Adapter:
    """Writes θ' of a group as an adapter, whole or not at all."""
    check_new(folder)
    adapter = as_adapter(changed_layers(adapted, group), adapted.model, rank, for_vllm)
    config = config_of(adapter, adapted.model)

    def write(temporary: Path) -> None:
        tensors = {name: tensor.cpu() for name, tensor in adapter.tensors.items()}
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(temporary))
        write_record(temporary, learnt, {"form": "lora"})

    write_folder(folder, write)
    return adapter


def check_new(folder: Path) -> None:
    if not is_empty(folder):
        raise UserError(f"folder: expected a new or empty folder, got {folder}")
