"""Stages before meta-training, for every task: its data, its base model, the teacher's answers."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import hash_of_file, write_folder
from ..data import SOURCES, Example, make_data, read_triples, tokenise_triples, write_triples
from ..evaluation import with_irrelevant_contexts
from ..loading import check_vocabulary, load_model, load_tokenizer
from ..teacher import TeacherCache
from ..training.checkpoint import MODEL_FOLDER, save_model
from ..training.loop import TrainOptions
from ..training.prepare import fine_tune
from .lab import Lab
from .stages import Result, Stage

SPLITS = ("train", "test")
CACHE_FOLDER = "cache"


def data(lab: Lab, task: str) -> Stage:
    """The task's triples within the limits as JSONL, each split in a seeded order.

    The order matters where contexts share a θ': neighbours in SQuAD ask about the same passage.
    """
    its, limits = lab.preset.tasks[task], lab.preset.limits

    def work(folder: Path) -> Result:
        tokenizer = load_tokenizer(lab.model)
        file, test_file = (None if f is None else Path(f) for f in (its.file, its.test_file))
        made = make_data(its.source, its.train, its.test, lab.seed, file, test_file)
        counts = {"made": made.counts}
        for split in SPLITS:
            records = getattr(made, split).to_list()
            triples = tokenise_triples(records, tokenizer, limits)
            kept = [records[index] for index in triples.kept]
            random.Random(f"{lab.seed} {split}").shuffle(kept)
            write_triples(kept, folder / f"{split}.jsonl")
            counts[split] = {"kept": len(kept), **triples.dropped}
        return {"counts": counts}

    wanted = {
        **{name: getattr(its, name) for name in ("source", "train", "test", "file", "test_file")},
        "revision": SOURCES[its.source].revision,
        "content": [hash_of_file(Path(file)) for file in (its.file, its.test_file) if file],
        "limits": asdict(limits),
        "model": lab.fingerprint,
    }
    return lab.stage(f"data/{task}", wanted, work)


def examples(
    lab: Lab,
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
    records = read_triples(data(lab, task).folder / f"{split}.jsonl")
    limits = lab.preset.limits
    if irrelevant is not None:
        records = with_irrelevant_contexts(records, irrelevant)
        # Every context and every query is within the limits, but not every prompt of the two.
        limits = replace(limits, prompt_tokens=limits.context_tokens + limits.query_tokens)
    chosen = tokenise_triples(records.to_list()[:count], tokenizer, limits).examples
    check_vocabulary(chosen, model)
    return chosen


def prepared(lab: Lab, task: str) -> Stage:
    """The base model of a task, and its frozen teacher: briefly fine-tuned in the Prompt and No
    Context formats (§4.3).
    """
    wanted = {"model": lab.fingerprint, "dtype": lab.preset.dtype}
    return fine_tuned(lab, f"base/{task}", lab.model, task, lab.preset.prepare_examples, wanted)


def fine_tuned(
    lab: Lab, name: str, start: Path, task: str, count: int, wanted: dict[str, Any]
) -> Stage:
    """A stage of ordinary fine-tuning with the options of ``[prepare]``.

    Args:
        name: of the stage.
        start: the folder of the model to begin with.
        task: the task to fine-tune on.
        count: the number of its training examples to go by.
        wanted: what the model to begin with follows from.
    """
    options = replace(lab.preset.prepare, seed=lab.seed)

    def work(folder: Path) -> Result:
        allowed = lab.allow_missing and start == lab.model
        model, tokenizer = load_model(start, lab.preset.dtype, lab.device, allow_missing=allowed)
        chosen = examples(lab, task, "train", model, tokenizer, count)
        with lab.autocast():
            fine_tune(model, chosen, options)
        write_folder(folder / MODEL_FOLDER, lambda into: save_model(model, tokenizer, into))
        return {"examples": len(chosen), "steps": options.steps}

    its = {"data": data(lab, task).key, "examples": count, "options": asdict(options)}
    return lab.stage(name, {**wanted, **its}, work)


def taught(lab: Lab, task: str, options: TrainOptions) -> Stage:
    """The base model's answers to its prompted training queries, for the KL objective."""

    def work(folder: Path) -> Result:
        return {"examples": len(teacher_cache(lab, task, folder, options).examples)}

    wanted = {
        "base": prepared(lab, task).key,
        "answer_tokens": options.answer_tokens,
        "batch_size": options.teacher_batch_size,
        "bfloat16": lab.in_bfloat16,
    }
    return lab.stage(f"teacher/{task}", wanted, work)


def teacher_cache(lab: Lab, task: str, folder: Path, options: TrainOptions) -> TeacherCache:
    """The cache in the folder of a :func:`taught` stage: built or continued, or opened."""
    base = prepared(lab, task).folder / MODEL_FOLDER
    dtype = "bfloat16" if lab.in_bfloat16 else lab.preset.dtype
    teacher, tokenizer = load_model(base, dtype, lab.device)
    prompted = examples(lab, task, "train", teacher, tokenizer)
    batch_size = options.teacher_batch_size
    return TeacherCache.build(
        folder / CACHE_FOLDER, teacher, prompted, options.answer_tokens, batch_size
    )
