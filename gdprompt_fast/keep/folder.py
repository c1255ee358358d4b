"""Folders of θ': an adapter or a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..artifacts.files import is_empty, write_folder, write_json
from ..errors import UserError
from ..update.attach import AdaptedModel
from .adapter import Adapter, as_adapter, config_of
from .layers import changed_layers

WEIGHTS_FILE, RECORD_FILE = "adapter_model.safetensors", "gdprompt.json"


def save_adapter(
    adapted: AdaptedModel, folder: Path, group: int, rank: int | None, for_vllm: bool
) -> Adapter:
    adapter = as_adapter(changed_layers(adapted, group), adapted.model, rank, for_vllm)
    config = config_of(adapter, adapted.model)

    def write(temporary: Path) -> None:
        save_file(
            {name: tensor.cpu() for name, tensor in adapter.tensors.items()},
            temporary / WEIGHTS_FILE,
            metadata={"format": "pt"},
        )
        config.save_pretrained(str(temporary))

    check_new(folder)
    write_folder(folder, write)
    return adapter


def check_new(folder: Path) -> None:
    if not is_empty(folder):
        raise UserError(f"folder: expected a new or empty folder, got {folder}")
