"""Short training runs of a small model on people."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from gdprompt_fast.data import Example, Limits
from gdprompt_fast.data.people import people_tokenizer
from gdprompt_fast.loading import add_lora
from gdprompt_fast.teacher import Teacher, TeacherCache, TeacherOnTheFly
from gdprompt_fast.training.loop import meta_train
from gdprompt_fast.training.options import TrainOptions
from helpers.models import small_llama

ROOMY = Limits(400, 400, 400)
TOKENIZER = people_tokenizer()
GOLD = TrainOptions(
    steps=7, batch_size=2, outer_lr=1e-2, warmup_steps=2, inner_lr=0.3, objective="gold",
    lm_weight=0.1, checkpoint_every=3, group_by_length=False,
)  # fmt: skip
KL = dataclasses.replace(GOLD, objective="kl")
GROUPED = dataclasses.replace(
    KL, batch_size=1, contexts_per_group=2, queries_per_context=2, lm_on="prompts"
)
LENGTHS = dataclasses.replace(KL, group_by_length=True)
LORA = dataclasses.replace(KL, inner_params="lora", inner_steps=2)


def tiny_llama(seed: int = 0) -> torch.nn.Module:
    model = small_llama(
        len(TOKENIZER),
        seed,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return model.train()


def initial_model(lora: bool) -> torch.nn.Module:
    return add_lora(tiny_llama(), rank=2, seed=0) if lora else tiny_llama()


def run(
    options: TrainOptions,
    examples: list[Example],
    output: Path,
    lora: bool = False,
    joint: list[Example] | None = None,
    on_the_fly: bool = False,
    **beside: Any,
) -> dict[str, torch.Tensor]:
    """A run from the same initial model; its final weights.

    Args:
        on_the_fly: the teacher is asked anew in every step.
        beside: what else ``meta_train`` takes.
    """
    model = initial_model(lora)
    teacher: Teacher | None = None
    if options.objective == "kl" and on_the_fly:
        teacher = TeacherOnTheFly(tiny_llama(seed=1).eval(), examples, 3, batch_size=2)
    elif options.objective == "kl":
        teacher = TeacherCache.build(
            output / "teacher", tiny_llama(seed=1).eval(), examples, 3, batch_size=4
        )
    meta_train(model, TOKENIZER, examples, options, output, teacher, joint, **beside)
    return {name: value.clone() for name, value in model.state_dict().items()}
