"""Stages before meta-training, for every task: its data, its base model, the teacher's answers."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checkpoint import MODEL_FOLDER, save_model, write_folder
from ..data import Example, read_triples, tokenise_triples, write_triples
from ..data.sources import make_data
from ..loading import check_vocabulary, load_model
from ..prepare import fine_tune
from ..teacher import TeacherCache
from .lab import Lab
from .stages import Result, Stage

SPLITS = ("train", "test")


def data(lab: Lab, task: str) -> Stage:
    """The task's triples as JSONL, each split in a seeded order; the result counts them.

    The order matters where contexts share a θ': neighbours in SQuAD ask about the same passage.
    """
    its = lab.preset.tasks[task]

    def work(folder: Path) -> Result:
        source = None if its.file is None else Path(its.file)
        made = make_data(its.source, its.train, its.test, lab.seed, source)
        for split in SPLITS:
            records = list(getattr(made, split))
            random.Random(f"{lab.seed} {split}").shuffle(records)
            write_triples(records, folder / f"{split}.jsonl")
        return {"counts": made.counts}

    wanted = {name: getattr(its, name) for name in ("source", "train", "test", "file")}
    return lab.stage(f"data/{task}", wanted, work)


def examples(
    lab: Lab,
    task: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    count: int | None = None,
) -> list[Example]:
    """The first ``count`` examples of a split that are within the preset's limits; None: all."""
    records = read_triples(data(lab, task).folder / f"{split}.jsonl")
    kept = tokenise_triples(records, tokenizer, lab.preset.limits).examples
    check_vocabulary(kept, model)
    return kept[:count]


def prepared(lab: Lab, task: str) -> Stage:
    """The base model of a task, and its frozen teacher: briefly fine-tuned in the Prompt and No
    Context formats (§4.3).
    """
    wanted = {
        "data": data(lab, task).key,
        "model": lab.fingerprint,
        "dtype": lab.preset.dtype,
        "limits": asdict(lab.preset.limits),
    }
    return fine_tuned(lab, f"base/{task}", lab.model, task, lab.preset.prepare_examples, wanted)


def fine_tuned(
    lab: Lab, name: str, start: Path, task: str, count: int, wanted: dict[str, object]
) -> Stage:
    """A stage of ordinary fine-tuning with the options of ``[prepare]``.

    Args:
        name: of the stage.
        start: the folder of the model to begin with.
        task: the task to fine-tune on.
        count: the number of its training examples to go by.
        wanted: the settings of the stage beside these.
    """
    options = replace(lab.preset.prepare, seed=lab.seed)

    def work(folder: Path) -> Result:
        model, tokenizer = load_model(start, lab.preset.dtype, lab.device)
        chosen = examples(lab, task, "train", tokenizer, model, count)
        with lab.autocast():
            fine_tune(model, chosen, options)
        write_folder(folder / MODEL_FOLDER, lambda into: save_model(model, tokenizer, into))
        return {"examples": len(chosen)}

    return lab.stage(name, {**wanted, "examples": count, "options": asdict(options)}, work)


def teacher(lab: Lab, task: str, answer_tokens: int, batch_size: int) -> Stage:
    """The base model's greedy answers to its prompted training queries, in ``cache``."""
    base = prepared(lab, task)

    def work(folder: Path) -> Result:
        model, tokenizer = load_model(base.folder / MODEL_FOLDER, lab.preset.dtype, lab.device)
        prompts = examples(lab, task, "train", tokenizer, model)
        with lab.autocast():
            TeacherCache.build(
                folder / "cache", model, tokenizer, prompts, answer_tokens, batch_size
            )
        return {"examples": len(prompts)}

    wanted = {"base": base.key, "answer_tokens": answer_tokens}
    return lab.stage(f"teacher/{task}", wanted, work)
