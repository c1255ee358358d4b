"""Checkpoints that are whole or not there."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import hash_of_file, read_json, write_folder, write_json
from ..artifacts.tensors import SavedTensors, write_tensors
from ..data import Sampler
from ..distributed.group import check_same, writes
from ..distributed.sharded import is_sharded
from ..errors import UserError
from ..loading import load_adapter_weights, load_base, one_line_errors
from .sharded import (
    is_peft,
    load_sharded,
    make_base_absolute,
    put_back,
    save_sharded,
    taken_out,
)

CHECKPOINTS = "checkpoints"
STATE_FILE, OPTIMIZER_FILE = "training_state.pt", "optimizer.safetensors"
MODEL_FOLDER = "model"
HASHES_FILE = "sha256.json"


class Stateful(Protocol):
    """What an optimizer has for a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def write_together(folder: Path, model: nn.Module, write: Callable[[Path | None], None]) -> None:
    """As :func:`gdprompt_fast.artifacts.files.write_folder`; the other processes of a sharded model
    take part in gathering it, with None for a folder.
    """
    if writes():
        write_folder(folder, write)
    elif is_sharded(model):
        write(None)


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> None:
    """The model (of a PEFT model its adapters) as safetensors, with its tokenizer.

    Args:
        folder: of a sharded model None in a process that does not write.
    """
    if is_sharded(model):
        save_sharded(model, folder)
    elif folder is not None:
        _save_whole(model, folder)
    if folder is not None:
        tokenizer.save_pretrained(folder)


def _save_whole(model: nn.Module, folder: Path) -> None:
    extra = {}
    if is_peft(model):
        # PEFT would otherwise look on the hub whether the embeddings have been resized.
        extra = {"save_embedding_layers": False}
        make_base_absolute(model)
    model.save_pretrained(folder, **extra)  # type: ignore[operator]


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts the weights of :func:`save_model` back into ``model``."""
    with one_line_errors(f"a checkpoint to load in {folder}"):
        if is_peft(model):
            load_adapter_weights(model, folder)
            return
        if is_sharded(model):
            load_sharded(model, folder)
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
    state: dict[str, Any] = {
        "step": step,
        "positions": {name: sampler.position for name, sampler in samplers.items()},
        "optimizer": optimizer.state_dict(),
        "python_rng": random.getstate(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }

    if not writes() and not is_sharded(model):
        return
    sharded = taken_out(state["optimizer"]) if is_sharded(model) else {}

    def write(folder: Path | None) -> None:
        save_model(model, tokenizer, folder and folder / MODEL_FOLDER)
        if sharded:
            write_tensors(folder and folder / OPTIMIZER_FILE, sharded)
        if folder is not None:
            torch.save(state, folder / STATE_FILE)
            write_json(folder / HASHES_FILE, _hashes(folder))

    newest = output / CHECKPOINTS / f"step-{step:08d}"
    write_together(newest, model, write)
    for folder in _checkpoints(output):
        if writes() and folder != newest:
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
    by_rows = is_sharded(model)
    if by_rows:
        check_same("output: the files of its checkpoint", read_json(checkpoints[-1] / HASHES_FILE))
    state: dict[str, Any] = torch.load(
        checkpoints[-1] / STATE_FILE, map_location="cpu", weights_only=True, mmap=by_rows
    )
    if (checkpoints[-1] / OPTIMIZER_FILE).is_file():
        saved = SavedTensors(checkpoints[-1] / OPTIMIZER_FILE)
        state["optimizer"]["state"] = put_back(saved, by_rows)
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
