"""What ``gdprompt train`` and ``gdprompt search-outer-lr`` start from, loaded and checked."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data import Example, Limits
from ..errors import UserError
from ..loading import (
    add_lora,
    check_same_tokens,
    check_same_vocabulary,
    choose_device,
    load_model,
    positions,
    print_notes,
    room_before_answer,
)
from ..models.inner_params import select_inner
from ..teacher import TeacherCache, cache_key, check_cache
from ..training.loop import TrainOptions
from .reading import Reader
from .train_run import TestSet


@dataclass(frozen=True)
class Job:
    """A model and all that its training reads.

    Attributes:
        teacher: the frozen model of the KL objective, None for gold.
        teacher_cache: the folder of its answers.
        test: what to measure on, if anything.
        joint: what to fine-tune on in the same steps, if anything.
        reader: what read them, which knows the records it dropped.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    options: TrainOptions
    teacher: nn.Module | None
    teacher_cache: Path
    test: TestSet | None
    joint: list[Example] | None
    reader: Reader

    def build_teacher_cache(self) -> TeacherCache | None:
        """Has the teacher answer what it has not answered yet; then its memory is free."""
        if self.teacher is None:
            return None
        cache = TeacherCache.build(
            self.teacher_cache,
            self.teacher,
            self.examples,
            self.options.answer_tokens,
            self.options.teacher_batch_size,
        )
        self.teacher.to("meta")
        return cache


def load_job(args: Namespace, options: TrainOptions) -> Job:
    """Loads what the options of the command line name, and checks that it goes together.

    Raises:
        ValueError: naming the option, what was expected and what was given.
    """
    device = choose_device(args.device)
    model, tokenizer = _model_to_train(args, options, device)
    teacher = _teacher_of(model, tokenizer, args, options, device)
    cache = args.teacher_cache or args.output / "teacher"

    reader = Reader.of(args)

    def read(path: Path, room: int) -> list[Example]:
        return reader.examples(path, model, tokenizer, limits(args, room))

    answered_by = [] if teacher is None else [model, teacher]
    rooms = [room_before_answer(each, options.answer_tokens) for each in answered_by]
    examples = read(args.data, min(rooms, default=positions(model)))
    test, joint = None, None
    if args.test_data:
        held_out = read(args.test_data, room_before_answer(model, options.answer_tokens))
        test = TestSet(held_out, args.inner_lr_grid, args.eval_batch_size, options.answer_tokens)
        warn_of_overlap(examples, held_out)
    if args.joint_data:
        joint = read(args.joint_data, positions(model))
    if teacher is not None and cache.exists():
        answer = (options.answer_tokens, options.teacher_batch_size)
        check_cache(cache, cache_key(teacher, examples, *answer))
    return Job(model, tokenizer, examples, options, teacher, cache, test, joint, reader)


def _model_to_train(
    args: Namespace, options: TrainOptions, device: torch.device
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    model, tokenizer = load_model(args.model, args.dtype, device, **hub_and_weights(args))
    print_notes(model, tokenizer)
    if args.dtype != "float32" and not args.lora_rank:
        raise UserError(
            f"dtype: expected float32 to train all weights, got {args.dtype}: steps of Adam are "
            "smaller than its rounding; --compute-dtype computes in it beside float32 weights, "
            "--lora-rank trains float32 adapters beside frozen weights of it"
        )
    if args.lora_rank:
        model = add_lora(model, args.lora_rank, options.seed)
    select_inner(model, options.inner_params)
    return model, tokenizer


def _teacher_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: Namespace,
    options: TrainOptions,
    device: torch.device,
) -> nn.Module | None:
    """The teacher of the KL objective, in the dtype that training computes in."""
    if options.objective != "kl":
        return None
    in_bfloat16 = "bfloat16" in (args.dtype, options.compute_dtype)
    dtype = "bfloat16" if in_bfloat16 else "float32"
    asked = hub_and_weights(args)
    if args.teacher:
        asked["revision"] = None  # that of --model
    teacher, its_tokenizer = load_model(args.teacher or args.model, dtype, device, **asked)
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


def hub_and_weights(args: Namespace) -> dict[str, Any]:
    """What ``load_model`` takes besides the name of ``--model``."""
    return {"revision": args.revision, "allow_missing": args.allow_missing}


def limits(args: Namespace, room: int) -> Limits:
    """The limits asked for, within the ``room`` that the model has positions for."""
    asked = (args.max_context_tokens, args.max_query_tokens, args.max_prompt_tokens)
    return Limits(*(min(limit, room) for limit in asked))
