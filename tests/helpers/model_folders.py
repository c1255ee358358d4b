"""Folders of models as people have them: in a cache, and changed in one place or another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Edit = Callable[[Path], object]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4e' * 32}\nsize 86434\n"


def to_cache(folder: Path, cache: Path, name: str, ref: str) -> None:
    """Puts a model folder where the hub's client would have downloaded it to."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / ref).write_text(COMMIT)


def edit_json(name: str, **changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content.update(changes)
        (folder / name).write_text(json.dumps(content))

    return edit


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Replaces the weights by what ``change`` makes of them."""
    path = folder / "model.safetensors"
    weights = change(load_file(path))
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})


def renamed(rename: Callable[[str], str]) -> Edit:
    return lambda folder: edit_weights(folder, lambda w: {rename(n): v for n, v in w.items()})


def write(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text)


def cut(name: str, size: int) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])
