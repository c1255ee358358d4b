"""Stages before meta-training, for every task: its data, its base model, the teacher's answers."""

from __future__ import annotations

import random
from array import array
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import hash_of_file, write_folder
from ..artifacts.stage import Result, Stage
from ..data import SOURCES, Example, make_data, read_triples, tokenise_triples, write_triples
from ..evaluation import with_irrelevant_contexts
from ..loading import check_vocabulary, load_model, load_tokenizer
from ..teacher import Teacher, TeacherCache, TeacherOnTheFly
from ..training.checkpoint import MODEL_FOLDER, save_model
from ..training.finetune import fine_tune
from ..training.options import TrainOptions
from .context import ExperimentContext

SPLITS = ("train", "test")
CACHE_FOLDER = "cache"


def data_stage(ctx: ExperimentContext, task: str) -> Stage:
    """The task's triples within the limits as JSONL, each split in a seeded order.

    The order matters where contexts share a θ': neighbours in SQuAD ask about the same passage.
    """
    its, limits = ctx.preset.tasks[task], ctx.preset.limits_of(task)

    def work(folder: Path) -> Result:
        tokenizer = load_tokenizer(ctx.model)
        file, test_file = (None if f is None else Path(f) for f in (its.file, its.test_file))
        made = make_data(its.source, its.train, its.test, ctx.seed, file, test_file)
        counts = {"made": made.counts}
        for split in SPLITS:
            records = getattr(made, split).to_list()
            triples = tokenise_triples(records, tokenizer, limits)
            kept = [records[index] for index in triples.kept]
            random.Random(f"{ctx.seed} {split}").shuffle(kept)
            write_triples(kept, folder / f"{split}.jsonl")
            counts[split] = {"kept": len(kept), **triples.dropped}
        return {"counts": counts}

    wanted = {
        **{name: getattr(its, name) for name in ("source", "train", "test", "file", "test_file")},
        "revision": SOURCES[its.source].revision,
        "content": [hash_of_file(Path(file)) for file in (its.file, its.test_file) if file],
        "limits": asdict(limits),
        "model": ctx.fingerprint,
    }
    return ctx.stage(f"data/{task}", wanted, work)


def examples(
    ctx: ExperimentContext,
    task: str,
    split: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    count: int | None = None,
    irrelevant: int | None = None,
) -> list[Example]:
    """The first ``count`` examples of a split; None: all.

    Args:
        irrelevant: every example gets the context of another, drawn with this seed among all of
            the split; None: its own.
    """
    records = read_triples(data_stage(ctx, task).folder / f"{split}.jsonl")
    limits = ctx.preset.limits_of(task)
    if irrelevant is not None:
        records = with_irrelevant_contexts(records, irrelevant)
        # Every context and every query is within the limits, but not every prompt of the two.
        limits = replace(limits, prompt_tokens=limits.context_tokens + limits.query_tokens)
    chosen = tokenise_triples(records.to_list()[:count], tokenizer, limits).examples
    check_vocabulary(chosen, model)
    return chosen


def prepare_stage(ctx: ExperimentContext, task: str) -> Stage:
    """The base model of a task, and its frozen teacher: briefly fine-tuned in the Prompt and No
    Context formats (§4.3).
    """
    wanted = {"model": ctx.fingerprint, "dtype": ctx.preset.dtype}
    return fine_tune_stage(
        ctx, f"base/{task}", ctx.model, task, ctx.preset.prepare_examples, wanted
    )


def fine_tune_stage(
    ctx: ExperimentContext, name: str, start: Path, task: str, count: int, wanted: dict[str, Any]
) -> Stage:
    """A stage of ordinary fine-tuning with the options of ``[prepare]``.

    Args:
        name: of the stage.
        start: the folder of the model to begin with.
        task: the task to fine-tune on.
        count: the number of its training examples to go by.
        wanted: what the model to begin with follows from.
    """
    options = replace(ctx.preset.prepare, seed=ctx.seed)

    def work(folder: Path) -> Result:
        allowed = ctx.allow_missing and start == ctx.model
        model, tokenizer = load_model(start, ctx.preset.dtype, ctx.device, allow_missing=allowed)
        chosen = examples(ctx, task, "train", model, tokenizer, count)
        with ctx.autocast():
            fine_tune(model, chosen, options)
        write_folder(folder / MODEL_FOLDER, lambda into: save_model(model, tokenizer, into))
        return {"examples": len(chosen), "steps": options.steps}

    its = {"data": data_stage(ctx, task).key, "examples": count, "options": asdict(options)}
    return ctx.stage(name, {**wanted, **its}, work)


def teacher_stage(ctx: ExperimentContext, task: str, options: TrainOptions) -> Stage:
    """The base model's answers to its prompted training queries, for the KL objective; of a task
    whose teacher is asked on the fly, nothing but the settings that they follow from.
    """
    on_the_fly = ctx.preset.tasks[task].teacher_on_the_fly

    def work(folder: Path) -> Result:
        if on_the_fly:
            return {}
        return {"examples": len(teacher_of(ctx, task, folder, options).examples)}

    wanted = {
        "on_the_fly": on_the_fly,
        "base": prepare_stage(ctx, task).key,
        "answer_tokens": options.answer_tokens,
        "batch_size": options.teacher_batch_size,
        "bfloat16": ctx.in_bfloat16,
    }
    return ctx.stage(f"teacher/{task}", wanted, work)


def teacher_of(ctx: ExperimentContext, task: str, folder: Path, options: TrainOptions) -> Teacher:
    """The teacher of a task: its cache in the folder of a :func:`teacher_stage`, built or
    continued, or opened; or the model itself, to be asked on the fly.
    """
    base = prepare_stage(ctx, task).folder / MODEL_FOLDER
    dtype = "bfloat16" if ctx.in_bfloat16 else ctx.preset.dtype
    teacher, tokenizer = load_model(base, dtype, ctx.device)
    prompted = examples(ctx, task, "train", teacher, tokenizer)
    answer = options.answer_tokens, options.teacher_batch_size
    if ctx.preset.tasks[task].teacher_on_the_fly:
        return TeacherOnTheFly(teacher, prompted, *answer)
    return TeacherCache.build(folder / CACHE_FOLDER, teacher, prompted, *answer)


def running_text(
    ctx: ExperimentContext,
    split: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    count: int | None = None,
) -> list[array[int]]:
    """Rows of running text: the triples of ``[text]``'s task, each as the one text it was cut from,
    without EOS; at most as long as the longest context.
    """
    chosen = examples(ctx, ctx.preset.text_task, split, model, tokenizer, count)
    longest = ctx.preset.limits_of(ctx.preset.text_task).context_tokens
    return [(example.prompt + example.response[:-1])[:longest] for example in chosen]
