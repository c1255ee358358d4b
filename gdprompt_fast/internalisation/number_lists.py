"""Lists of numbers, with a model from scratch: does it take pre-training?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerBase

from ..artifacts.stage import Result, Stage
from ..config.fields import Config, check_counts, from_section
from ..report.outcome import Outcome
from .context import Context, seeded
from .main import found
from .material.numbers import NumberOptions, number_material, number_tokenizer
from .material.subsets import NUMBERS, Material
from .measured import PAPER, STRONG, WEAK, Scores, of_seeds, power_notes, table
from .preset import AskOptions, Preset
from .stages import Staged, staged_work
from .train import TrainOptions

TITLE = "Lists of numbers, from scratch"
WHERE = "lists of numbers"
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
class Options(Config):
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


def check(preset: Preset, options: Options) -> None:
    """
    Raises:
        UserError: naming what is wrong in a part of the section.
    """
    _ = options.numbers, options.size, options.staged


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


def number_stage(ctx: Context, options: Options, fractions: Mapping[str, float] = NUMBERS) -> Stage:
    """The run of a seed."""
    numbers, size, staged = options.numbers, options.size, options.staged
    wanted = {
        "lists": asdict(numbers),
        "model": asdict(size),
        "fractions": dict(fractions),
        "questions": options.questions,
        **staged.settings(),
    }

    def material(stage2_seed: int) -> Material:
        return number_material(numbers, fractions, ctx.seed, stage2_seed)

    def model() -> tuple[nn.Module, PreTrainedTokenizerBase]:
        made, tokenizer = new_model(size, numbers, [material(0)], ctx.seed)
        return made.to(ctx.device), tokenizer

    def work(folder: Path) -> Result:
        ask = AskOptions(new_tokens=2, batch_size=512, questions=options.questions)
        return staged_work(folder, model, material, staged, ask, ctx.seed)

    return ctx.stage("number-lists", wanted, work)


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    scores = Scores([number_stage(ctx, options) for ctx in repetitions])
    numbers, size = options.numbers, options.size
    model = new_model(size, numbers, [number_material(numbers, NUMBERS, 0, 0)], 0)[0]
    count = sum(each.numel() for each in model.parameters())
    about = [
        f"{numbers.variables} variables, each a number of 0 to {numbers.numbers - 1}; lists of "
        f"{numbers.length}. {size.layers} layers of width {size.width}, {count:,} parameters.",
        "The answers are true and false, so chance is 50 %.",
        f"{of_seeds(repetitions)}, and {options.stage2_seeds} of the second stage from each.",
    ]
    gaps = {"weak": scores.gap(WEAK), "strong": scores.gap(STRONG)}
    row = {"model from scratch": scores}
    tables = [
        table("Exact match after the first stage", WEAK, row),
        table("Exact match after the second stage", STRONG, row),
    ]
    return Outcome(
        TITLE,
        tables,
        found(WHERE, scores),
        [*about, *power_notes({f"{name} internalisation": gap for name, gap in gaps.items()})],
        paper=PAPER,
        over_seeds=True,
    )
