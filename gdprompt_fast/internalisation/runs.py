"""The runs of both stages that most experiments are made of, each a stage that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..artifacts.stage import Result, Stage
from .context import Context
from .material.texts import TextRules
from .preset import RunOptions, settings_of
from .sources import Source, source_of
from .stages import Staged, staged_work


@dataclass(frozen=True)
class Run:
    """What a run follows from.

    Attributes:
        name: of its stage.
        rules: how entities become texts.
        options: the experiment's section.
        model: the pretrained one that it begins with; None: the preset's.
        joint: whether both stages' texts are trained on at once.
    """

    name: str
    rules: TextRules
    options: RunOptions
    model: str | None = None
    joint: bool = False


def run_stages(repetitions: Sequence[Context], run: Run, name: str) -> list[Stage]:
    """The run of every seed that ``name``, a model or a word order, has."""
    count, second = run.options.fewer.get(name, (len(repetitions), run.options.stage2_seeds))
    own = replace(run, options=replace(run.options, stage2_seeds=second))
    return [run_stage(ctx, own) for ctx in repetitions[:count]]


def run_stage(ctx: Context, run: Run) -> Stage:
    """A run, done or read: its result has the ``first`` and, for every second stage, ``second``
    scores by test set, as :func:`gdprompt_fast.internalisation.answers.scored` gives them.
    """
    options = run.options
    source = source_of(ctx, options.source, run.rules, options.lists, options.entities, run.model)
    staged = trainings(source, run)
    ask = replace(source.ask, new_tokens=options.new_tokens or source.ask.new_tokens)
    wanted = {**source.settings, "joint": run.joint, "ask": settings_of(ask), **staged.settings()}

    def work(folder: Path) -> Result:
        parts = (source.new_model, source.material, staged, ask, ctx.seed)
        return staged_work(folder, *parts, joint=run.joint)

    return ctx.stage(run.name, wanted, work)


def trainings(source: Source, run: Run) -> Staged:
    """The trainings of the source, with what the experiment says over them."""
    options = run.options
    if run.joint:
        return Staged(source.training("joint", options.joint), None, 1)
    first = source.training("first", options.first)
    return Staged(first, source.training("second", options.second), options.stage2_seeds)
