"""The stages of experiments: what a model does with a task, and how alike fine-tuning and ICL are.

Of a task and model, ZSL and ICL are kept as tensors; of each method only numbers an example.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..artifacts.files import write_whole
from ..artifacts.stage import Result, Stage
from .context import BASE, UNTRAINED, IclContext
from .methods import CONTROLS, Method, recorder_after
from .metrics import Answers, Observed, sim_am, sim_am_delta, sim_aou, sim_aou_random
from .observing import in_context, observe, recorded_rows, zero_shot

ZSL, ICL = "zsl", "icl"
POINT_METRICS = ("sim_aou", "sim_am", "sim_am_delta")


@dataclass(frozen=True)
class Compared:
    """A method beside ZSL and ICL, on N examples.

    Attributes:
        answers: of all three.
        at_points: similarities by metric, [N, P], NaN where there is none.
    """

    answers: Answers
    at_points: dict[str, Tensor]


def compared(ctx: IclContext, task: str, method: Method, which: str = BASE) -> Compared:
    """A method beside ZSL and ICL, done now if it is not there."""
    reference = reference_stage(ctx, task, which).result
    its = method_stage(ctx, task, method, which).result
    count = its["examples"]
    labels = [reference[key][:count] for key in (ZSL, ICL)]
    answers = Answers(*map(torch.tensor, (*labels, its["predicted"], reference["gold"][:count])))
    return Compared(answers, {name: tensor_of(its[name]) for name in POINT_METRICS})


def before_method(ctx: IclContext, task: str, which: str = BASE) -> Compared:
    """ZSL in the place of a method, with the similarities of noise to ICL as ``sim_aou``."""
    its = reference_stage(ctx, task, which).result
    labels = map(torch.tensor, (its[ZSL], its[ICL], its[ZSL], its["gold"]))
    return Compared(
        Answers(*labels), {"sim_am": tensor_of(its["sim_am"]), "sim_aou": tensor_of(its["noise"])}
    )


def reference_stage(ctx: IclContext, task: str, which: str) -> Stage:
    """ZSL and ICL: both as tensors in the stage's folder."""
    count = ctx.count(task, control=which == UNTRAINED)
    batch_size = ctx.preset.evaluate.batch_size

    def work(folder: Path) -> Result:
        model, prompts = ctx.load(which), ctx.prompts(task)
        zsl = observe(zero_shot(model, prompts, count, batch_size), prompts, count)
        icl = observe(in_context(model, prompts, count, batch_size), prompts, count)
        for name, observed in ((ZSL, zsl), (ICL, icl)):
            tensors = {key: value.contiguous() for key, value in vars(observed).items()}
            write_whole(folder / f"{name}.safetensors", partial(save_file, tensors))
        return {
            "examples": count,
            "gold": prompts.gold[:count],
            "demonstrations_in_prompt": len(prompts.spans),
            ZSL: zsl.predicted.tolist(),
            ICL: icl.predicted.tolist(),
            "sim_am": numbers(sim_am(icl, zsl)),
            "noise": numbers(sim_aou_random(icl, zsl, ctx.seed)),
        }

    return ctx.stage(
        f"reference/{task}/{which}", {**ctx.task_settings(task), "examples": count}, work
    )


def method_stage(ctx: IclContext, task: str, method: Method, which: str) -> Stage:
    """What a method does, in numbers an example."""
    control = which == UNTRAINED or method.kind in CONTROLS
    count = ctx.count(task, control)
    reference = reference_stage(ctx, task, which)
    batch_size = ctx.preset.evaluate.batch_size

    def work(folder: Path) -> Result:
        model, prompts = ctx.load(which), ctx.prompts(task)
        zsl, icl = (read_observed(reference.folder, each).first(count) for each in (ZSL, ICL))
        with recorder_after(method, model, prompts) as recorder:
            before, device = [prompts.bos], ctx.device
            rows = recorded_rows(recorder, before, prompts, count, batch_size, device)
            ft = observe(rows, prompts, count)
        width = ft.scores.shape[-1]
        zsl, icl = (replace(each, scores=each.scores[..., :width]) for each in (zsl, icl))
        return {
            "examples": count,
            "predicted": ft.predicted.tolist(),
            "sim_aou": numbers(sim_aou(icl, zsl, ft)),
            "sim_am": numbers(sim_am(icl, ft)),
            "sim_am_delta": numbers(sim_am_delta(icl, zsl, ft)),
        }

    name = method.kind if not method.clip else f"{method.kind}-{method.clip:g}"
    wanted = {"reference": reference.key, "method": asdict(method), "examples": count}
    return ctx.stage(f"methods/{task}/{which}/{name}", wanted, work)


def read_observed(folder: Path, name: str) -> Observed:
    """What a reference stage keeps of ``ZSL`` or ``ICL``."""
    return Observed(**load_file(folder / f"{name}.safetensors"))


def numbers(x: Tensor) -> Any:
    """For JSON, which has no NaN."""
    return [[value if math.isfinite(value) else None for value in row] for row in x.tolist()]


def tensor_of(of_rows: list[list[float | None]]) -> Tensor:
    """What :func:`numbers` was given; NaN for None."""
    rows = [[math.nan if value is None else value for value in row] for row in of_rows]
    return torch.tensor(rows, dtype=torch.float64)
