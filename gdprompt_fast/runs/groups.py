"""Fields that several commands have: in groups, as bases, and by themselves, as functions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config.fields import REQUIRED, CommandConfig, WritingConfig, option
from ..data import Limits
from ..loading import DTYPES, choose_device, load_model, print_notes

TRIPLES = (
    'JSONL or a JSON array of {"context", "query", "response"}, gzipped or not; "question", '
    '"privileged_context", "prompt" and the first of "answers" are taken for them; optional '
    '"context_loss": the spans of the context that count in the inner step'
)
REPLACES_FOLDER = "replace an --output that is not empty, and all in it"


def overwrite_field(what: str) -> Any:
    """Of ``overwrite``: what may be replaced."""
    return option(False, f"{what}; never an input", may_change=True)


def eval_batch_size_field() -> Any:
    """Of ``eval_batch_size``."""
    return option(32, "examples at once", may_change=True)


def dtype_field() -> Any:
    """Of ``dtype``."""
    return option("float32", "of the weights", tuple(DTYPES))


def inner_lr_grid_field() -> Any:
    """Of ``inner_lr_grid``."""
    rates = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    return option(rates, "inner rates of which an untrained model gets its best")


def lora_rank_field() -> Any:
    """Of ``lora_rank``."""
    return option(0, "of LoRA adapters; 0: train all")


def revision_field() -> Any:
    """Of ``revision``."""
    return option(None, "branch, tag or commit of --model on the hub")


def resume_field() -> Any:
    """Of ``resume``."""
    return option(False, "continue the run in --output", may_change=True)


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(CommandConfig):
    """Where models run."""

    device: str = option("auto", "cpu, cuda, cuda:1, …; auto: cuda or cpu", may_change=True)

    @property
    def torch_device(self) -> torch.device:
        """The device, if it is there.

        Raises:
            UserError: if it is not.
        """
        return choose_device(self.device)


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(CommandConfig):
    """Which of a model's weights are loaded."""

    revision: str | None = revision_field()
    allow_missing: bool = option(
        False,
        "go on with random weights for those that a model's files do not have",
        may_change=True,
    )

    @property
    def weights(self) -> dict[str, Any]:
        """What ``load_model`` takes besides the name of ``--model``."""
        return {"revision": self.revision, "allow_missing": self.allow_missing}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(WeightsConfig, DeviceConfig):
    """The model."""

    model: Path = option(
        REQUIRED,
        "transformers model or PEFT adapters: a folder, GGUF file or name on the hub",
        reads=True,
    )

    def load(
        self, dtype: str, device: torch.device | None = None
    ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The model on the device, or another one, and its tokenizer; what is to be known of them
        is printed.

        Raises:
            UserError: naming what of them is wrong.
        """
        there = device or self.torch_device
        model, tokenizer = load_model(self.model, dtype, there, **self.weights)
        print_notes(model, tokenizer)
        return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(WritingConfig):
    """How files are read."""

    encoding: str = option("utf-8", "of the files read, as utf-16")
    dropped: Path | None = option(
        None,
        "JSON file to write to which records were dropped, and why",
        writes=True,
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig(ReadingConfig):
    """The triples, how they become examples, and which do not."""

    data: Path = option(REQUIRED, TRIPLES, reads=True)
    chat_template: bool = option(
        False,
        "ask as a user's turn and take the response as the assistant's, in the words of the "
        "tokenizer's chat template; the context of the inner step stays running text",
    )
    max_context_tokens: int = option(256, "drop a record whose context row is longer")
    max_query_tokens: int = option(128, "drop a record whose query row is longer")
    max_prompt_tokens: int = option(384, "drop a record whose prompt row is longer")

    def limits(self, room: int) -> Limits:
        """The limits asked for, within the ``room`` that the model has positions for."""
        asked = (self.max_context_tokens, self.max_query_tokens, self.max_prompt_tokens)
        return Limits(*(min(limit, room) for limit in asked))
