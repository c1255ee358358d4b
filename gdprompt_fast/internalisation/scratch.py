"""Models from scratch for lists of numbers, and the section of a preset that has their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerBase

from ..config.fields import Config, check_counts, from_section
from .context import seeded
from .material.numbers import NumberOptions, number_tokenizer
from .material.subsets import Material
from .stages import Staged
from .train import TrainOptions

POSITIONS = 64


@dataclass(frozen=True)
class ModelSize(Config):
    """A GPT-NeoX of random weights, in the proportions of Pythia."""

    width: int = 512
    layers: int = 6
    heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "width", "layers", "heads")


@dataclass(frozen=True)
class NumberLists(Config):
    """The section ``[number-lists]``.

    Attributes:
        lists: sizes of the lists, the section ``[number-lists.lists]``.
        model: of the model.
        first, second: the stages of training.
        stage2_seeds: runs of the second stage from every first one.
        questions: the most of a test set.
    """

    lists: dict[str, Any]
    first: dict[str, Any]
    second: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    stage2_seeds: int = 1
    questions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "stage2_seeds")

    @property
    def numbers(self) -> NumberOptions:
        """The lists."""
        return from_section(NumberOptions, self.lists, "preset, [number-lists.lists]")

    def with_variables(self, count: int) -> NumberOptions:
        """The lists of another number of variables."""
        return replace(self.numbers, variables=count)

    @property
    def size(self) -> ModelSize:
        """The model."""
        return from_section(ModelSize, self.model, "preset, [number-lists.model]")

    @property
    def staged(self) -> Staged:
        """The trainings."""
        first, second = (
            from_section(TrainOptions, getattr(self, name), f"preset, [number-lists.{name}]")
            for name in ("first", "second")
        )
        return Staged(first, second, self.stage2_seeds)


def new_model(
    size: ModelSize, numbers: NumberOptions, materials: Sequence[Material], seed: int
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The random model of a seed, and its tokenizer."""
    tokenizer = number_tokenizer(numbers, materials)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=POSITIONS,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.pad_token_id,
    )
    with seeded(seed):
        return GPTNeoXForCausalLM(config).eval(), tokenizer
