"""Checkpoints that are whole or not there."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import hash_of_file, read_json, write_folder, write_json
from ..data import Sampler
from ..distributed.group import rank
from ..errors import UserError
from ..loading import load_adapter_weights, load_base, one_line_errors

CHECKPOINTS = "checkpoints"
STATE_FILE = "training_state.pt"
MODEL_FOLDER = "model"
HASHES_FILE = "sha256.json"


class Stateful(Protocol):
    """What an optimizer has for a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The model (of a PEFT model its adapters) as safetensors, with its tokenizer."""
    extra = {}
    if _is_peft(model):
        # PEFT would otherwise look on the hub whether the embeddings have been resized.
        extra = {"save_embedding_layers": False}
        _make_base_absolute(model)
    model.save_pretrained(folder, **extra)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def _make_base_absolute(model: Any) -> None:
    """Adapters find their base from any folder."""
    for config in model.peft_config.values():
        base = config.base_model_name_or_path
        if base and Path(base).exists():
            config.base_model_name_or_path = str(Path(base).absolute())


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts the weights of :func:`save_model` back into ``model``."""
    with one_line_errors(f"a checkpoint to load in {folder}"):
        if _is_peft(model):
            load_adapter_weights(model, folder)
            return
        saved = load_base(folder, model.config, model.dtype)  # type: ignore[arg-type]
        model.load_state_dict(saved.state_dict())


def save_checkpoint(
    output: Path,
    step: int,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: Stateful,
    samplers: Mapping[str, Sampler],
) -> None:
    """Writes everything that continuing after ``step`` needs, then removes older checkpoints; of
    several processes, which all call it, the first does.
    """
    state = {
        "step": step,
        "positions": {name: sampler.position for name, sampler in samplers.items()},
        "optimizer": optimizer.state_dict(),
        "python_rng": random.getstate(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }

    if rank() > 0:
        return

    def write(folder: Path) -> None:
        save_model(model, tokenizer, folder / MODEL_FOLDER)
        torch.save(state, folder / STATE_FILE)
        write_json(folder / HASHES_FILE, _hashes(folder))

    newest = output / CHECKPOINTS / f"step-{step:08d}"
    write_folder(newest, write)
    for folder in _checkpoints(output):
        if folder != newest:
            shutil.rmtree(folder)


def check_checkpoint(output: Path) -> int:
    """That the newest checkpoint is as it was written; returns its step, or 0 if there is none.

    Raises:
        ValueError: naming the file that is not.
    """
    checkpoints = _checkpoints(output)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    written, there = read_json(newest / HASHES_FILE), _hashes(newest)
    for name in sorted(written.keys() | there.keys()):
        if written.get(name) != there.get(name):
            got = "another" if name in there else "none"
            raise UserError(
                f"{newest / name}: expected the file as it was written, got {got}; without "
                f"{newest} training begins anew"
            )
    return int(newest.name.removeprefix("step-"))


def _hashes(checkpoint: Path) -> dict[str, str]:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(checkpoint)): hash_of_file(path) for path in files}
    return {name: value for name, value in hashes.items() if name != HASHES_FILE}


def load_checkpoint(
    output: Path,
    model: nn.Module,
    optimizer: Stateful,
    samplers: Mapping[str, Sampler],
) -> int:
    """Puts the newest checkpoint back; returns its step, or 0 without a change if there is none."""
    checkpoints = _checkpoints(output)
    if not checkpoints:
        return 0
    state: dict[str, Any] = torch.load(
        checkpoints[-1] / STATE_FILE, map_location="cpu", weights_only=True
    )
    load_weights(model, checkpoints[-1] / MODEL_FOLDER)
    optimizer.load_state_dict(state["optimizer"])
    for name, sampler in samplers.items():
        sampler.position = state["positions"][name]
    random.setstate(state["python_rng"])
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return int(state["step"])


def _checkpoints(output: Path) -> list[Path]:
    return sorted((output / CHECKPOINTS).glob("step-*"))


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")
