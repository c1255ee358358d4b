"""Where an experiment takes place: a folder, a device and a seed, and the stages that are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from ..artifacts.stage import Result, Stage, run_stage
from .versions import device_name, versions

STAGES = "stages"


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """One repetition of an experiment.

    Attributes:
        output: the folder of results and stages.
        device: where models run.
        seed: of the data, the training and the evaluation.
        used: the stages that this experiment asked for, by name; shared by its repetitions.
    """

    output: Path
    device: torch.device
    seed: int
    used: dict[str, Stage] = field(default_factory=dict)

    @classmethod
    def of_seeds(cls, seeds: Iterable[int], **common: Any) -> list[Self]:
        """One for every seed, alike in all else, which share ``used``."""
        used: dict[str, Stage] = {}
        return [cls(seed=seed, used=used, **common) for seed in seeds]

    def stage(
        self, name: str, settings: Mapping[str, Any], work: Callable[[Path], Result]
    ) -> Stage:
        """The stage of this name and seed, done now if it is not there.

        Raises:
            StaleStage: if it was done with other settings.
        """
        full_name = f"seed-{self.seed}/{name}"
        folder = self.output / STAGES / full_name
        done_with = {**versions(), "device": device_name(self.device)}
        stage = run_stage(
            folder, {**settings, "seed": self.seed}, _announced(full_name, work), done_with
        )
        self.used[full_name] = stage
        return stage


def _announced(name: str, work: Callable[[Path], Result]) -> Callable[[Path], Result]:
    def announced(folder: Path) -> Result:
        print(f"{name} …", flush=True)
        start = time.monotonic()
        result = work(folder)
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
        return result

    return announced
