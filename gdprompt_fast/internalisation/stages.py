"""A run: material, the first stage, and the second from it for every one of its seeds; scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import read_json, write_whole
from ..artifacts.stage import KeptResults, Result
from .answers import scored
from .material.subsets import FIRST, Material, Question
from .preset import AskOptions, settings_of
from .train import TrainOptions, to_block, train

SCORES_FILE, WEIGHTS_FILE = "scores.json", "first.pt"
NEVER_SEEN = "no_qd_baseline"

NewModel = Callable[[], tuple[nn.Module, PreTrainedTokenizerBase]]
MaterialOf = Callable[[int], Material]
Adds = Callable[[nn.Module, PreTrainedTokenizerBase], Callable[[int], None]]


@dataclass(frozen=True)
class Staged:
    """The trainings of a run; of a joint one, ``first`` is all there is."""

    first: TrainOptions
    second: TrainOptions | None
    stage2_seeds: int

    def settings(self) -> dict[str, Any]:
        """For the record of a stage."""
        seeds = self.stage2_seeds if self.second else 0
        both = {"first": settings_of(self.first), "second": settings_of(self.second)}
        return both | {"stage2_seeds": seeds}


def staged_work(
    folder: Path,
    new_model: NewModel,
    material_of: MaterialOf,
    staged: Staged,
    ask: AskOptions,
    seed: int,
    joint: bool = False,
    adds: Adds | None = None,
) -> Result:
    """Trains and scores; what is done is kept in ``folder``, so that the same call goes on.

    Args:
        joint: the texts of both stages are trained on in the first.
        adds: makes of the model what is called in every step of the first stage, to add to its
            gradient.
    """
    kept = KeptResults(folder / SCORES_FILE, read_json)
    weights = folder / WEIGHTS_FILE
    model, tokenizer = new_model()
    first = material_of(0)
    texts = first.joint if joint else first.stages[0]
    bf16 = staged.first.bf16

    def score(tests: Mapping[str, tuple[Question, ...]]) -> dict[str, str]:
        size = (ask.new_tokens, ask.batch_size, ask.questions)
        return scored(model, tokenizer, tests, *size, bf16=bf16)

    def train_on(
        texts: tuple[str, ...], options: TrainOptions, order: int, **more: Callable[[int], None]
    ) -> list[float]:
        block = to_block(texts, tokenizer, options.block, options.padding_in_loss)
        return train(model, block, options, order, folder, **more)

    if "first" not in kept.content:
        more = {} if adds is None else {"add_more": adds(model, tokenizer)}
        losses = train_on(texts, staged.first, seed, **more)
        write_whole(weights, partial(torch.save, model.state_dict()))
        tests = first.tests if joint else _of_stage(first.tests, 1)
        kept.keep("first", {"scores": score(asked(tests, ask)), "losses": losses})
    second = range(staged.stage2_seeds if staged.second else 0)
    for stage2_seed in second:
        if (name := f"second-{stage2_seed}") in kept.content:
            continue
        assert staged.second is not None
        model.load_state_dict(torch.load(weights, weights_only=True))
        material = material_of(stage2_seed)
        losses = train_on(material.stages[1], staged.second, stage2_seed)
        tests = _of_stage(material.tests, 2)
        kept.keep(name, {"scores": score(asked(tests, ask)), "losses": losses})
    weights.unlink(missing_ok=True)
    content = kept.content
    return {
        "first": content["first"]["scores"],
        "second": [content[f"second-{each}"]["scores"] for each in second],
        "losses": {name: each["losses"] for name, each in content.items()},
        "counts": {"first": len(texts), "second": 0 if joint else len(first.stages[1])},
    }


def asked(
    tests: Mapping[str, tuple[Question, ...]], ask: AskOptions
) -> dict[str, tuple[Question, ...]]:
    """The test sets that are asked for."""
    words = {"", *ask.attribution}
    return {name: each for name, each in tests.items() if name.partition(":")[2] in words}


def _of_stage(
    tests: Mapping[str, tuple[Question, ...]], stage: int
) -> dict[str, tuple[Question, ...]]:
    """The test sets on what a stage trains on, and on what is never seen."""
    return {
        name: each
        for name, each in tests.items()
        if name == NEVER_SEEN or name.startswith(FIRST) == (stage == 1)
    }
