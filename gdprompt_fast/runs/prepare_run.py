"""``gdprompt prepare``: a model that knows the Prompt and No Context formats (§4.3)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..artifacts.files import write_folder
from ..config.fields import REQUIRED, check_counts, option
from ..loading import positions
from ..training.checkpoint import save_model
from ..training.finetune import PrepareOptions, fine_tune
from .command import command, outputs_of
from .groups import REPLACES_FOLDER, ExamplesConfig, ModelConfig, overwrite_field
from .reading import Reader, write_dropped


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(PrepareOptions, ExamplesConfig, ModelConfig):
    """How to prepare which model on which examples."""

    command = "prepare"

    output: Path = option(REQUIRED, "folder to write the model to", writes=True, may_change=True)
    examples: int = option(1000, "take so many records, drawn at random with --seed")
    overwrite: bool = overwrite_field(REPLACES_FOLDER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "examples")


@command(
    "Briefly fine-tune a model in the Prompt and No Context formats (§4.3): what gdprompt train "
    "then starts from, and its teacher."
)
def prepare(config: PrepareConfig) -> Callable[[], None]:
    """Loads model and examples; the work is to fine-tune."""
    outputs_of(config).check_folder(config.output)
    model, tokenizer = config.load("float32")
    reader = Reader.of(config)
    chosen = reader.examples(config.data, model, tokenizer, config.limits(positions(model)))
    random.Random(config.seed).shuffle(chosen)  # a file comes in order of its articles
    chosen = chosen[: config.examples]
    print(f"fine-tuning on {len(chosen)}")

    def work() -> None:
        write_dropped(config.dropped, config.command, reader.dropped)
        fine_tune(model, chosen, config.part(PrepareOptions))
        write_folder(config.output, lambda folder: save_model(model, tokenizer, folder))
        print(f"model: {config.output}")

    return work
