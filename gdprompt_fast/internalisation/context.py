"""Where these experiments take place: a preset, a device, and a seed at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

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
    named = [preset.seeds_of(name) for name in preset.sections]
    seeds = sorted({seed for seeds in named for seed in seeds})
    common = dict(output=output, device=device, preset=preset, allow_missing=allow_missing)
    return {each.seed: each for each in Context.of_seeds(seeds, **common)}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, random weights and draws of torch are those of a seed; outside all is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
