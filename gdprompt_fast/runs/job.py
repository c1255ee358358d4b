"""What ``gdprompt train`` and ``gdprompt search-outer-lr`` have in common: what they start from."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import hash_of_file
from ..config.fields import REQUIRED, option
from ..data import Example, text_rows
from ..distributed.group import world_size
from ..distributed.sharded import release
from ..errors import UserError
from ..loading import (
    add_lora,
    check_same_tokens,
    check_same_vocabulary,
    load_model,
    max_prompt_length,
    positions,
)
from ..meta.gathered import shard
from ..models.inner_params import select_inner
from ..plan import parse_memory
from ..teacher import Teacher, TeacherCache, TeacherOnTheFly, cache_key, check_cache
from ..training.options import TrainOptions
from .fitting import fitting
from .groups import (
    ExamplesConfig,
    ModelConfig,
    dtype_field,
    eval_batch_size_field,
    inner_lr_grid_field,
    lora_rank_field,
    resume_field,
)
from .reading import Reader
from .results import TestSet

NOT_KEPT = Path("none")  # in the place of the folder of a teacher's answers


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(TrainOptions, ExamplesConfig, ModelConfig):
    """What to train, on what, and how."""

    preset_section: ClassVar[str] = "train"

    eval_batch_size: int = eval_batch_size_field()
    dtype: str = dtype_field()
    output: Path = option(REQUIRED, "folder to write to", writes=True, may_change=True)
    preset: str | None = option(
        None,
        "TOML file, or paper: its [train] sets defaults of these options",
        reads=True,
        may_change=True,
        init=False,
    )
    test_data: Path | None = option(None, "triples to evaluate on before and after", reads=True)
    joint_data: Path | None = option(
        None, "triples to fine-tune on, as usual, in the same steps", reads=True
    )
    lm_data: Path | None = option(
        None, "text file on which --lm-weight counts, in the place of --lm-on", reads=True
    )
    teacher: Path | None = option(
        None, "kl teacher, as --model, a hub's at main; None: --model", reads=True
    )
    teacher_cache: Path | None = option(
        None,
        "folder of its answers; None: in --output; none: nothing is kept, the teacher stays in "
        "memory and is asked anew in every step",
        reads=True,
        writes=True,
        may_change=True,
    )
    lora_rank: int = lora_rank_field()
    inner_lr_grid: tuple[float, ...] = inner_lr_grid_field()
    memory: str | None = option(
        None, "size of the card, as 80GB: takes the largest micro-batch that is predicted to fit"
    )
    resume: bool = resume_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lm_data is not None and not self.lm_weight:
            raise UserError("lm_data: expected an lm_weight > 0 beside it, got 0")
        if self.memory is not None:
            parse_memory(self.memory)
            if self.micro_batch:
                raise UserError(
                    f"memory: expected none beside micro_batch {self.micro_batch}, got "
                    f"{self.memory!r}, which finds one"
                )

    @property
    def divides_weights(self) -> bool:
        """Whether several processes have a part of the weights each."""
        return self.sharding == "full" and world_size() > 1

    @property
    def loading_device(self) -> torch.device:
        """Where models are loaded to: the host for those that are divided then."""
        return torch.device("cpu") if self.divides_weights else self.torch_device

    @property
    def options(self) -> TrainOptions:
        """Those of the training alone."""
        return self.part(TrainOptions)

    @property
    def cache_folder(self) -> Path | None:
        """The folder of the teacher's answers; None: they are not kept."""
        if self.teacher_cache == NOT_KEPT:
            return None
        return self.teacher_cache or self.output / "teacher"


def run_settings(config: TrainingConfig) -> dict[str, Any]:
    """The settings of a run, and what the files of triples hold that they name."""
    names = ("data", "test_data", "joint_data", "lm_data")
    files = {name: getattr(config, name) for name in names}
    hashes = {f"{name}_sha256": hash_of_file(path) for name, path in files.items() if path}
    return {**config.settings(), **hashes}


@dataclass(frozen=True)
class Job:
    """A model and all that its training reads.

    Attributes:
        teacher: the frozen model of the KL objective, None for gold.
        teacher_cache: the folder of its answers; None: they are not kept.
        test: what to measure on, if anything.
        joint: what to fine-tune on in the same steps, if anything.
        texts: rows of running text for L_LM, if it is on a corpus.
        reader: what read them, which knows the records it dropped.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    options: TrainOptions
    teacher: nn.Module | None
    teacher_cache: Path | None
    test: TestSet | None
    joint: list[Example] | None
    texts: list[array[int]] | None
    reader: Reader

    def build_teacher(self) -> Teacher | None:
        """Has the teacher answer what it has not answered yet, and its memory is free; or, without
        a cache, only has it ready.
        """
        if self.teacher is None:
            return None
        answer = self.options.answer_tokens, self.options.teacher_batch_size
        if self.teacher_cache is None:
            return TeacherOnTheFly(self.teacher, self.examples, *answer)
        cache = TeacherCache.build(self.teacher_cache, self.teacher, self.examples, *answer)
        release(self.teacher)
        return cache


def load_job(config: TrainingConfig, options: TrainOptions) -> Job:
    """Loads what the configuration names, and checks that it goes together.

    Args:
        options: of the training, or of the first of several.

    Raises:
        ValueError: naming the option, what was expected and what was given.
    """
    model, tokenizer = _model_to_train(config)
    teacher = _teacher_of(model, tokenizer, config)
    cache = config.cache_folder

    reader = Reader.of(config)

    def read(path: Path, room: int) -> list[Example]:
        return reader.examples(path, model, tokenizer, config.limits(room))

    answered_by = [] if teacher is None else [model, teacher]
    rooms = [max_prompt_length(each, options.answer_tokens) for each in answered_by]
    examples = read(config.data, min(rooms, default=positions(model)))
    test, joint, texts = None, None, None
    if config.test_data:
        held_out = read(config.test_data, max_prompt_length(model, options.answer_tokens))
        test = TestSet(
            held_out,
            config.inner_lr_grid,
            config.eval_batch_size,
            options.answer_tokens,
            options.group_by_length,
        )
        warn_of_overlap(examples, held_out)
    if config.memory is not None:
        options = fitting(options, model, examples, parse_memory(config.memory))
    if config.joint_data:
        joint = read(config.joint_data, positions(model))
    if config.lm_data:
        tokens = min(config.max_context_tokens, positions(model))
        texts = text_rows(config.lm_data, tokenizer, tokens, config.encoding)
    if teacher is not None and cache is not None and cache.exists():
        answer = (options.answer_tokens, options.teacher_batch_size)
        check_cache(cache, cache_key(teacher, examples, *answer))
    if config.divides_weights:
        model = shard(model, config.torch_device)
        teacher = teacher and shard(teacher, config.torch_device)
    return Job(model, tokenizer, examples, options, teacher, cache, test, joint, texts, reader)


def _model_to_train(config: TrainingConfig) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    model, tokenizer = config.load(config.dtype, config.loading_device)
    if config.dtype != "float32" and not config.lora_rank:
        raise UserError(
            f"dtype: expected float32 to train all weights, got {config.dtype}: steps of Adam are "
            "smaller than its rounding; --compute-dtype computes in it beside float32 weights, "
            "--lora-rank trains float32 adapters beside frozen weights of it"
        )
    if config.lora_rank:
        model = add_lora(model, config.lora_rank, config.seed)
    select_inner(model, config.inner_params)
    return model, tokenizer


def _teacher_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
) -> nn.Module | None:
    """The teacher of the KL objective, in the dtype that training computes in."""
    if config.objective != "kl":
        return None
    in_bfloat16 = "bfloat16" in (config.dtype, config.compute_dtype)
    dtype = "bfloat16" if in_bfloat16 else "float32"
    asked = config.weights
    if config.teacher:
        asked["revision"] = None  # that of --model
    teacher, its_tokenizer = load_model(
        config.teacher or config.model, dtype, config.loading_device, **asked
    )
    check_same_vocabulary(teacher, model)
    check_same_tokens(its_tokenizer, tokenizer)
    return teacher


def warn_of_overlap(train: Sequence[Example], test: Sequence[Example]) -> None:
    """Says on stderr how many examples are tested on that are trained on too.

    No error: the scores of training examples are worth knowing, and large data sets have a few
    duplicates, as long as nobody takes them for unseen ones.
    """
    trained = {example.prompt.tobytes() for example in train}
    count = sum(example.prompt.tobytes() in trained for example in test)
    if count:
        print(
            f"warning: {count} of {len(test)} examples of --test-data (context and query) are in "
            "--data too: their scores are not those of unseen examples",
            file=sys.stderr,
        )
