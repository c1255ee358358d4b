"""Stages of the study of second order: trainings watched on the way, and the time of a step."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import read_json
from ..artifacts.stage import KeptResults, Result, Stage
from ..config.fields import Config, check_counts
from ..data import Example, units_by_context
from ..errors import UserError
from ..evaluation import evaluate
from ..exactness.engine import meta_gradient
from ..exactness.gradient import EngineGradients
from ..exactness.objective import StepArguments
from ..exactness.precision import bf16_precision
from ..exactness.weights import left_as_it_was
from ..meta.capture import why_eager
from ..meta.step import fast_meta_step
from ..models.memory import wait_for
from ..report.versions import device_name
from ..teacher import Teacher
from ..training.checkpoint import CHECKPOINTS, MODEL_FOLDER
from ..training.loop import meta_train
from ..training.options import TrainOptions
from ..training.step_data import StepData
from .context import ExperimentContext
from .preset import OBJECTIVES, check_choice
from .tasks import data_stage, examples, prepare_stage, teacher_of, teacher_stage
from .variants import Variant, load_base

CURVE_FILE = "curve.json"
WARM, TIMED = 3, 20  # steps of each way


@dataclass(frozen=True)
class Options(Config):
    """The section ``[second-order]``.

    Attributes:
        task: the task, which goes by whether an answer is the gold response.
        objective: ``kl`` or ``gold``.
        inner_lrs: the inner rates η.
        steps: outer steps of a training.
        points: how often a training is measured, evenly, beside before its first step.
        probes: batches of training contexts on which gradients are compared.
    """

    task: str
    objective: str
    inner_lrs: tuple[float, ...]
    steps: int
    points: int
    probes: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective", self.objective, OBJECTIVES)
        check_counts(self, "steps", "points", "probes")
        if not self.inner_lrs or min(self.inner_lrs) <= 0:
            raise UserError(
                f"inner_lrs: expected rates > 0, at least one, got {list(self.inner_lrs)}"
            )


@dataclass(frozen=True)
class Way:
    """How the meta-gradient is computed.

    Attributes:
        name: of its stages.
        head: in tables.
    """

    name: str
    head: str
    first_order: bool = False
    compute_dtype: str = "float32"


EXACT = Way("exact", "exact")
BF16 = Way("bf16", "exact, in bf16", compute_dtype="bfloat16")
FIRST_ORDER = Way("first-order", "first-order", first_order=True)
WAYS = (EXACT, BF16, FIRST_ORDER)


def time_stage(ctx: ExperimentContext, options: Options) -> Stage:
    """The seconds of a meta step of each way at the base model, the fastest of several in turns, by
    name: what else the machine does only adds to them.
    """
    wanted = {
        "base": prepare_stage(ctx, options.task).key,
        "options": _train_options(ctx, options, EXACT, options.inner_lrs[0]).lasting(),
    }

    def work(folder: Path) -> Result:
        model, tokenizer = load_base(ctx, Variant(options.task))
        chosen = examples(ctx, options.task, "train", model, tokenizer)
        times: dict[str, list[float]] = {way.name: [] for way in WAYS}
        steps = {
            way.name: _timed_step(
                model, chosen, _train_options(ctx, options, way, options.inner_lrs[0])
            )
            for way in WAYS
        }
        for _ in range(WARM + TIMED):
            for name, step in steps.items():
                times[name].append(step())
        seconds = {name: min(of[WARM:]) for name, of in times.items()}
        return {"seconds": seconds, "device": device_name(ctx.device)}

    return ctx.stage(f"second-order/{options.task}/time", wanted, work)


def _timed_step(
    model: nn.Module, chosen: Sequence[Example], options: TrainOptions
) -> Callable[[], float]:
    """Takes a meta step with gold responses, and says how long it took."""
    options = replace(options, objective="gold")
    units = units_by_context(chosen, options.queries_per_context)[: options.contexts]
    device: torch.device = next(model.parameters()).device
    ladder = not why_eager(model, options.step_config, device)
    arguments = StepData.of(chosen, units, None).arguments(model, options, ladder)

    def step() -> float:
        wait_for(device)
        start = time.perf_counter()
        with options.computing(model):
            fast_meta_step(model, **arguments, config=options.step_config)
        wait_for(device)
        return time.perf_counter() - start

    return step


def training_stage(ctx: ExperimentContext, options: Options, way: Way, inner_lr: float) -> Stage:
    """A training of the task's base model, and what was measured on the way.

    Its result has the ``curve``: for every point the number of outer steps, the NLL of the gold
    responses, for every test example whether its answer was the gold response ("1") or not ("0"),
    and, where the way is exact, for every probe the cosine with the exact meta-gradient of the
    first-order one and of that in bf16.
    """
    train = _train_options(ctx, options, way, inner_lr)
    teacher = teacher_stage(ctx, options.task, train) if options.objective == "kl" else None
    count = options.probes if way is EXACT else 0
    wanted = {
        "base": prepare_stage(ctx, options.task).key,
        "teacher": None if teacher is None else teacher.key,
        "data": data_stage(ctx, options.task).key,
        "options": train.lasting(),
        "points": options.points,
        "probes": count,
    }

    def work(folder: Path) -> Result:
        cache = None if teacher is None else teacher_of(ctx, options.task, teacher.folder, train)
        model, tokenizer = load_base(ctx, Variant(options.task))
        chosen = examples(ctx, options.task, "train", model, tokenizer)
        curve = KeptResults(folder / CURVE_FILE, read_json)
        watched = _Watched(ctx, options.task, model, tokenizer, train)
        probes = list(_probes(chosen, cache, model, train, count))
        steps = [round(train.steps * point / options.points) for point in range(options.points + 1)]

        def watch(step: int) -> None:
            if step in steps:
                curve.once(str(step), lambda: watched.point(step, probes))

        meta_train(model, tokenizer, chosen, train, folder, cache, watch=watch)
        for left in (CHECKPOINTS, MODEL_FOLDER):  # what was measured is all that is asked of it
            shutil.rmtree(folder / left, ignore_errors=True)
        return {"steps": train.steps, "curve": [curve.content[str(step)] for step in steps]}

    name = f"second-order/{options.task}/{way.name}-rate-{inner_lr:g}"
    return ctx.stage(name, wanted, work)


def _train_options(
    ctx: ExperimentContext, options: Options, way: Way, inner_lr: float
) -> TrainOptions:
    return ctx.preset.train_options(
        options.task,
        objective=options.objective,
        seed=ctx.seed,
        steps=options.steps,
        inner_lr=inner_lr,
        first_order=way.first_order,
        compute_dtype=way.compute_dtype,
        prompt_weight=0.0,  # of which the inner step has nothing
    )


def _probes(
    chosen: Sequence[Example],
    cache: Teacher | None,
    model: nn.Module,
    train: TrainOptions,
    count: int,
) -> Iterator[StepArguments]:
    """The steps on the first batches of the training contexts, not captured, without L_LM, which
    is no matter of the inner step.
    """
    units = units_by_context(chosen, train.queries_per_context)
    config = replace(train.step_config, lm_weight=0.0, capture="never")
    for start in range(0, count * train.contexts, train.contexts):
        data = StepData.of(chosen, units[start : start + train.contexts], cache)
        arguments = data.arguments(model, replace(train, lm_weight=0.0))
        yield StepArguments(**arguments, **vars(config))


@dataclass(frozen=True)
class _Watched:
    """A model in training, and how it is measured."""

    ctx: ExperimentContext
    task: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    train: TrainOptions

    def point(self, step: int, probes: Sequence[StepArguments]) -> dict[str, Any]:
        test = examples(self.ctx, self.task, "test", self.model, self.tokenizer)
        scores = evaluate(
            self.model,
            self.tokenizer,
            test,
            self.train.inner,
            self.ctx.preset.evaluate.batch_size,
            settings=("fine_tuning",),
            answer_tokens=0,
        )["fine_tuning"]
        return {
            "step": step,
            "nll": scores.summary().nll_per_example,
            "correct": "".join("01"[right] for right in scores.correct.tolist()),
            "gradients": [self._compared(probe) for probe in probes],
        }

    def _compared(self, probe: StepArguments) -> dict[str, float]:
        """Cosines with the exact meta-gradient, or with its second-order term."""
        with left_as_it_was(self.model):
            whole, first = (meta_gradient(self.model, probe, way)[1] for way in (False, True))
            precision = bf16_precision(self.model, probe, EngineGradients(whole, first))
        return {
            "first_order": precision.first_order[0],
            "bf16": precision.gradient[0],
            "bf16_second_order": precision.second_order[0],
        }
