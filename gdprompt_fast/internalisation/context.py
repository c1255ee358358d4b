"""Where these experiments take place: a preset, a device, and a seed at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..artifacts.files import hash_of_file
from ..artifacts.stage import Stage
from ..loading import find_model
from ..report.repetition import Repetition
from .preset import Preset


@dataclass(frozen=True, kw_only=True)
class Context(Repetition):
    """One repetition of an experiment of this room.

    Attributes:
        preset: the sizes and rates.
        allow_missing: as ``load_model`` takes it.
    """

    preset: Preset
    allow_missing: bool = False


def contexts(
    preset: Preset, output: Path, device: torch.device, allow_missing: bool = False
) -> dict[int, Context]:
    """A repetition for every seed that an experiment of the preset has, by seed."""
    used: dict[str, Stage] = {}
    named = [preset.seeds_of(name) for name in preset.sections]
    return {
        seed: Context(
            output=output,
            device=device,
            seed=seed,
            used=used,
            preset=preset,
            allow_missing=allow_missing,
        )
        for seed in sorted({seed for seeds in named for seed in seeds})
    }


def fingerprint_of(name: str, revision: str | None) -> str:
    """A hash of a model's files: another model under the same name makes stages stale.

    Raises:
        UserError: if there is no such model.
    """
    digest = hashlib.sha256()
    for path in sorted(find_model(name, revision).folder.glob("*")):
        if path.suffix in (".json", ".safetensors", ".bin", ".model"):
            digest.update(f"{path.name} {hash_of_file(path)}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, random weights and draws of torch are those of a seed; outside all is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
