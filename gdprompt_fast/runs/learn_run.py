"""``gdprompt learn``: an adapter for every text, what an inner step on it left in the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import hash_of_file, write_json
from ..artifacts.outputs import written_by
from ..artifacts.progress import progress_bar
from ..config.fields import REQUIRED, check_counts, option
from ..data import (
    Context,
    ContextRow,
    TripleEncoder,
    batched,
    encode_contexts,
    pad,
    read_contexts,
    reason_to_drop_context,
)
from ..distributed.group import barrier, rank, share, world_size, writing_own_files
from ..errors import UserError
from ..evaluation import InnerStep, check_inner_step
from ..keep.adapter import check_rank
from ..keep.card import table
from ..keep.folder import FORMS, save
from ..keep.record import RECORD_FILE, Learnt, read_record
from ..loading import positions, vocabulary_size
from ..meta.inner import inner_step
from ..models.inner_params import INNER_PARAMS
from .command import command, outputs_of
from .groups import (
    REPLACES_FOLDER,
    ModelConfig,
    ReadingConfig,
    dtype_field,
    overwrite_field,
    resume_field,
)
from .output import SETTINGS_FILE, check_output, claim_output
from .reading import write_dropped

INDEX_FILE = "adapters.json"
OWN_FILES = (SETTINGS_FILE, INDEX_FILE)
INNER_CHOICES = ("auto", *INNER_PARAMS)


@dataclass(frozen=True, kw_only=True)
class LearnConfig(ReadingConfig, ModelConfig):
    """What to learn, with which inner step, and what to keep of it."""

    command = "learn"

    text: tuple[Path, ...] = option((), "text files, each a context", reads=True)
    data: Path | None = option(
        None,
        'JSONL or a JSON array of {"context"} or triples, gzipped or not; each context once',
        reads=True,
    )
    output: Path = option(REQUIRED, "folder to write to", writes=True, may_change=True)
    inner_lr: float = option(1e-3, "rate η of the inner step")
    inner_steps: int = option(1, "inner steps on a context")
    inner_params: str = option(
        "auto", "what the inner step moves; auto: linear with --for-vllm, else full", INNER_CHOICES
    )
    form: str = option("lora", "a PEFT adapter (lora), or the whole model (full)", FORMS)
    rank: int | None = option(None, "highest rank of a layer; None: what exact takes")
    for_vllm: bool = option(
        False, "one rank for all layers that vLLM has room for: 8, 16, 32, 64, 128, 256, 320 or 512"
    )
    batch_size: int = option(16, "contexts at once", may_change=True)
    max_context_tokens: int = option(
        0, "drop a context whose row is longer; 0: one longer than the model has positions for"
    )
    dtype: str = dtype_field()
    resume: bool = resume_field()
    overwrite: bool = overwrite_field(REPLACES_FOLDER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "batch_size")
        check_counts(self, "max_context_tokens", least=0)
        check_rank(self.rank, self.for_vllm)
        if not self.text and self.data is None:
            raise UserError("text: expected text files, or data, got neither")
        if self.form == "full" and (self.rank is not None or self.for_vllm):
            raise UserError('form: expected "lora" with a rank or for_vllm, got "full"')
        if self.for_vllm and self.inner.params == "full":
            raise UserError('inner_params: expected "linear" or "lora" with for_vllm, got "full"')

    @property
    def inner(self) -> InnerStep:
        """The inner step asked for."""
        auto = "linear" if self.for_vllm else "full"
        params = auto if self.inner_params == "auto" else self.inner_params
        return InnerStep(self.inner_lr, self.inner_steps, params)

    def settings(self) -> dict[str, Any]:
        """Those of the fields, and what the files hold that they name."""
        files = [*self.text, *([] if self.data is None else [self.data])]
        return {**super().settings(), "sha256": [hash_of_file(path) for path in files]}


class Lesson(NamedTuple):
    """A context, its tokens, and the folder of what is kept of it."""

    context: Context
    row: ContextRow
    folder: Path


@command(
    "Learn texts: for each a PEFT adapter, what an inner step on it left in the weights.",
    continued_by="--resume goes on with the texts that are left",
    shared=True,
)
def learn(config: LearnConfig) -> Callable[[], list[dict[str, Any]]]:
    """Loads model and texts; the work is to learn each, and returns the list of what was kept."""
    outputs = outputs_of(config)
    if rank() == 0:
        check_output(config.output, config.resume, outputs)
    contexts = read_contexts(config.text, config.data, config.encoding, OWN_FILES)
    model, tokenizer = config.load(config.dtype)
    check_inner_step(model, config.inner, one_after_another=False)
    lessons, dropped = _lessons(config, contexts, model, tokenizer)
    if rank() == 0:
        claim_output(config.output, config.settings(), config.resume, outputs)

    def work() -> list[dict[str, Any]]:
        barrier()
        write_dropped(config.dropped, config.command, dropped)
        by_length = sorted(lessons, key=_length, reverse=True)
        batches = list(batched(by_length, config.batch_size))
        with progress_bar(len(lessons), "learning", "text") as bar, writing_own_files():
            for batch in share(batches):
                _learn(config, model, tokenizer, batch)
                bar.update(len(batch) * world_size())
        barrier()
        kept = [_entry(lesson) for lesson in lessons]
        write_json(config.output / INDEX_FILE, {**written_by(config.command), "kept": kept})
        print(_report(config, kept))
        return kept

    return work


def _lessons(
    config: LearnConfig,
    contexts: Sequence[Context],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Lesson], list[dict[str, Any]]]:
    """What is to be learnt, and what was dropped.

    Raises:
        UserError: if nothing is left, or the tokenizer's ids are not the model's.
    """
    limit = min(config.max_context_tokens or positions(model), positions(model))
    lessons, dropped = [], []
    for context, row in zip(
        contexts, encode_contexts(contexts, TripleEncoder(tokenizer)), strict=True
    ):
        reason = reason_to_drop_context(row, limit)
        if reason is None:
            lessons.append(Lesson(context, row, config.output / context.name))
        else:
            place = {"file": str(context.file), "line": context.line}
            dropped.append({**place, "id": context.name, "reason": reason})
            print(f"dropped {context.name}: {reason}")
    if not lessons:
        raise UserError(f"text: expected at least one usable text, got none of {len(contexts)}")
    largest = max(max(lesson.row.ids) for lesson in lessons)
    if largest >= vocabulary_size(model):
        raise UserError(
            f"tokenizer: expected ids below the model's vocabulary of {vocabulary_size(model)}, "
            f"got {largest}"
        )
    print(f"{len(lessons)} of {len(contexts)} texts to learn")
    return lessons, dropped


def _is_kept(lesson: Lesson) -> bool:
    return (lesson.folder / RECORD_FILE).exists()


def _length(lesson: Lesson) -> int:
    return len(lesson.row.ids)


def _learn(
    config: LearnConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Lesson],
) -> None:
    """Takes the inner step on some contexts at once and keeps θ' of those that are not kept yet:
    the batches of a continued run are those of one left alone, and so what they give.
    """
    left = [group for group, lesson in enumerate(batch) if not _is_kept(lesson)]
    if not left:
        return
    ids, mask = pad([lesson.row.ids for lesson in batch])
    counts, device, inner = mask.clone(), next(model.parameters()).device, config.inner
    for row, lesson in zip(counts, batch, strict=True):
        if lesson.row.counts is not None:
            row[: len(lesson.row.counts)] = torch.tensor(lesson.row.counts)
    update = inner_step(
        model,
        ids.to(device),
        mask.to(device),
        inner_lr=inner.lr,
        inner_steps=inner.steps,
        inner_params=inner.params,
        context_loss_mask=counts.to(device),
    )
    for group in left:
        save(
            update.adapted,
            batch[group].folder,
            group,
            Learnt(inner.lr, inner.steps, inner.params, (batch[group].context.text,)),
            form=config.form,
            rank=config.rank,
            for_vllm=config.for_vllm,
            tokenizer=tokenizer,
        )


def _entry(lesson: Lesson) -> dict[str, Any]:
    """What the list of adapters says of one."""
    record, context = read_record(lesson.folder), lesson.context
    return {
        "folder": lesson.folder.name,
        "file": str(context.file),
        "line": context.line,
        "tokens": len(lesson.row.ids),
        **{key: record[key] for key in ("ranks", "discarded") if key in record},
    }


def _report(config: LearnConfig, kept: Sequence[dict[str, Any]]) -> str:
    """What was discarded of each layer, in words, over all texts."""
    said = f"{len(kept)} texts learnt: {config.output}"
    if config.form == "full":
        return said
    layers = dict.fromkeys(name for entry in kept for name in entry["ranks"])
    ranks = {n: max(entry["ranks"].get(n, 0) for entry in kept) for n in layers}
    worst = {n: max(entry["discarded"].get(n, 0.0) for entry in kept) for n in layers}
    if not any(worst.values()):
        return f"{said}\nexact, at ranks up to {max(ranks.values())}: nothing is discarded"
    return f"{said}\nwhat the worst of them lost of each layer:\n\n{table(ranks, worst)}"
