"""Where an experiment takes place: a preset and a model, and a seed at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..bundled import bundled_folder
from ..errors import UserError
from ..loading import find_model, fingerprint_of, load_config
from ..report.repetition import Repetition
from .preset import Preset

BUNDLED = "bundled"


@dataclass(frozen=True, kw_only=True)
class ExperimentContext(Repetition):
    """One repetition of an experiment of this room.

    Attributes:
        preset: the sizes and rates.
        model: the folder of the model that everything begins with.
        fingerprint: of that model's files.
        allow_missing: as ``load_model`` takes it, for that model.
    """

    preset: Preset
    model: Path
    fingerprint: str
    allow_missing: bool = False

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
    return ExperimentContext.of_seeds(
        preset.seeds,
        output=output,
        device=device,
        preset=preset,
        model=model,
        fingerprint=fingerprint_of(model),
        allow_missing=allow_missing,
    )


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
