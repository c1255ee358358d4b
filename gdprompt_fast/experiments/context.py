"""Where an experiment takes place: a preset, a folder, a device, and a seed at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..artifacts.stage import Result, Stage, run_stage
from ..bundled import bundled_folder
from ..errors import UserError
from ..loading import find_model, load_config
from .preset import Preset
from .versions import device_name, versions

STAGES = "stages"
BUNDLED = "bundled"
READ_AT_ONCE = 1 << 24  # bytes


@dataclass(frozen=True)
class ExperimentContext:
    """One repetition of an experiment.

    Attributes:
        preset: the sizes and rates.
        output: the folder of results and stages.
        device: where models run.
        model: the folder of the model that everything begins with.
        fingerprint: of that model's files.
        seed: of the data, the training and the evaluation.
        allow_missing: as ``load_model`` takes it, for that model.
        used: the stages that this experiment asked for, by name; shared by its repetitions.
    """

    preset: Preset
    output: Path
    device: torch.device
    model: Path
    fingerprint: str
    seed: int
    allow_missing: bool = False
    used: dict[str, Stage] = field(default_factory=dict)

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

    @property
    def in_bfloat16(self) -> bool:
        """Whether training computes in bf16; everything else then does so too."""
        return self.preset.train.get("compute_dtype") == "bfloat16"

    def autocast(self) -> AbstractContextManager[None]:
        """Computes in the type that training computes in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bfloat16)


def experiment_contexts(
    preset: Preset, output: Path, device: torch.device, allow_missing: bool = False
) -> list[ExperimentContext]:
    """A repetition for every seed of the preset.

    Raises:
        ValueError: if the model is not there.
    """
    model = base_model(preset.model, preset.revision)
    config = load_config(str(model))
    room = getattr(config, "max_position_embeddings", None)
    if room is None:
        raise UserError(f"model: expected a causal LM, got one of type {config.model_type}")
    needed = preset.longest_prompt + preset.longest_answer
    if needed > room:
        raise UserError(
            "limits: expected prompt_tokens and answer_tokens within the model's "
            f"{room} positions, got {needed} together"
        )
    fingerprint, used = _fingerprint(model), dict[str, Stage]()
    common = (preset, output, device, model, fingerprint)
    return [ExperimentContext(*common, seed, allow_missing, used) for seed in preset.seeds]


def base_model(name: str, revision: str | None) -> Path:
    """The folder of ``"bundled"``, of a path, or of a model on the hub, downloaded if need be.

    Raises:
        ValueError: if there is none.
    """
    if name != BUNDLED:
        return find_model(name, revision).folder
    if revision is not None:
        raise UserError(f"revision: expected none of the bundled model, got {revision!r}")
    return bundled_folder()


def _fingerprint(folder: Path) -> str:
    """A hash of the model's files: another model under the same name makes stages stale."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".safetensors", ".bin", ".model"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(READ_AT_ONCE):
                    digest.update(block)
    return digest.hexdigest()[:16]


def _announced(name: str, work: Callable[[Path], Result]) -> Callable[[Path], Result]:
    def announced(folder: Path) -> Result:
        print(f"{name} …", flush=True)
        start = time.monotonic()
        result = work(folder)
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
        return result

    return announced
