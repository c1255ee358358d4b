"""Checkpoints that are whole or not there, and a metrics file that goes with them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .data import ShuffledSampler
from .files import write_file, write_folder

CHECKPOINTS = "checkpoints"
STATE_FILE = "training_state.pt"
MODEL_FOLDER = "model"
EVENTS_FOLDER = "tensorboard"


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The model (of a PEFT model its adapters) as safetensors, with its tokenizer."""
    # PEFT would otherwise look on the hub whether the embeddings have been resized.
    extra = {"save_embedding_layers": False} if _is_peft(model) else {}
    model.save_pretrained(folder, **extra)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts the weights of :func:`save_model` back into ``model``."""
    if _is_peft(model):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
        return
    saved = type(model).from_pretrained(folder, dtype=model.dtype)  # type: ignore[attr-defined]
    model.load_state_dict(saved.state_dict())


def save_checkpoint(
    output: Path,
    step: int,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    samplers: Mapping[str, ShuffledSampler],
) -> None:
    """Writes everything that continuing after ``step`` needs, then removes older checkpoints."""
    state = {
        "step": step,
        "positions": {name: sampler.position for name, sampler in samplers.items()},
        "optimizer": optimizer.state_dict(),
        "python_rng": random.getstate(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }

    def write(folder: Path) -> None:
        save_model(model, tokenizer, folder / MODEL_FOLDER)
        torch.save(state, folder / STATE_FILE)

    newest = output / CHECKPOINTS / f"step-{step:08d}"
    write_folder(newest, write)
    for folder in _checkpoints(output):
        if folder != newest:
            shutil.rmtree(folder)


def load_checkpoint(
    output: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samplers: Mapping[str, ShuffledSampler],
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


class MetricsLog:
    """A JSONL file with one row a step; opened at ``step``, it forgets what came after.

    The same numbers go to event files in the folder ``tensorboard`` beside it where TensorBoard is
    installed.
    """

    def __init__(self, path: Path, step: int) -> None:
        rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        write_file(path, "".join(f"{row}\n" for row in rows[:step]))
        self._file = path.open("a", encoding="utf-8")
        self._events = _event_writer(path.parent / EVENTS_FOLDER, step)

    def write(self, row: dict[str, float]) -> None:
        """Appends the row of ``row["step"]``; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in row.items():
                if name != "step":
                    self._events.add_scalar(name, value, int(row["step"]))
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _event_writer(folder: Path, step: int) -> Any:
    """A TensorBoard writer that hides the events after ``step``; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
