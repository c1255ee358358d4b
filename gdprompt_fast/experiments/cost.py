"""What the trainings of experiments will cost: memory from the plan, hours by operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..artifacts.markdown import markdown_table
from ..data import SOURCES
from ..errors import UserError
from ..loading import load_config
from ..plan import PlannedStep, predict
from ..training.options import TrainOptions
from . import EXPERIMENTS
from .context import ExperimentContext
from .preset import Preset
from .variants import Variant

# Operations a second of whole steps: on one H200, captured, of Llama 3.2 1B in bf16 and of smaller
# ones in float32; on two threads of a CPU, of a Llama of 63 M parameters. See docs/measured.md.
SPEEDS = {("cuda", "bfloat16"): 4.5e14, ("cuda", "float32"): 4e13, ("cpu", "float32"): 1.2e11}
SLOW = SPEEDS["cpu", "float32"]


def describe_cost(names: Sequence[str], repetitions: Sequence[ExperimentContext]) -> str:
    """What the trainings of these experiments cost, as a table, or why that is not known."""
    try:
        return _cost_table(names, repetitions)
    except UserError as error:
        return f"cost: not estimated ({error})"


def _cost_table(names: Sequence[str], repetitions: Sequence[ExperimentContext]) -> str:
    """A table of what is meta-trained: steps, memory and hours, and all hours together.

    Hours are of 12·P·T_c + 6·P·T_q operations a step (P parameters, T_c and T_q tokens of contexts
    and queries) at the longest rows that the preset allows, at a speed that was measured once; so
    they are a guide. Teachers, preparation and evaluation come on top.
    """
    preset, device = repetitions[0].preset, repetitions[0].device
    trained = _trained(names, repetitions)
    rows = [["meta-trained", "times", "steps", "predicted peak", "hours, estimated"]]
    total = 0.0
    peaks: dict[PlannedStep, tuple[int, int]] = {}
    config = load_config(str(repetitions[0].model))
    for variant, times in trained.items():
        options = variant.options(repetitions[0])
        planned = planned_step(preset, variant, options)
        if planned not in peaks:
            prediction = predict(config, planned)
            peaks[planned] = prediction.peak_bytes, prediction.parameters
        peak, parameters = peaks[planned]
        steps = steps_of(preset, variant, options)
        tokens = 12 * planned.batch * planned.context + 6 * planned.batch * planned.query
        speed = SPEEDS.get((device.type, options.compute_dtype), SLOW)
        hours = None if steps is None else steps * tokens * parameters / speed / 3600
        total += times * (hours or 0)
        cells = ["one epoch" if steps is None else str(steps), f"{peak / 1e9:.1f} GB"]
        rows.append([variant.name, str(times), *cells, "?" if hours is None else _hours(hours)])
    return (
        f"{markdown_table(rows)}\n\nAll of it about {_hours(total)} hours on this device if it is "
        f"as fast as the one measured ({device.type}); teachers, preparation and "
        "evaluation come on top. What the folder holds already is not done again."
    )


def _trained(names: Sequence[str], repetitions: Sequence[ExperimentContext]) -> dict[Variant, int]:
    """Every variant that is meta-trained, and for how many seeds."""
    preset = repetitions[0].preset
    found: dict[Variant, set[int]] = {}
    for name in names:
        options: Any = preset.section(name, EXPERIMENTS[name].options)
        for variant in EXPERIMENTS[name].variants(preset, options):
            if variant.objective != "none" and not variant.then:
                found.setdefault(variant, set()).update(preset.seeds_of(name))
    return {variant: len(seeds) for variant, seeds in found.items()}


def planned_step(preset: Preset, variant: Variant, options: TrainOptions) -> PlannedStep:
    """The outer step of a variant, on the longest rows."""
    limits = preset.limits_of(variant.task)
    query = limits.query_tokens * options.queries_per_context
    return PlannedStep(
        batch=options.contexts,
        context=limits.context_tokens,
        query=query,
        response=min(options.answer_tokens * options.queries_per_context, query - 1),
        inner=options.inner_params,
        outer="lora" if variant.lora_rank else "full",
        lora_rank=max(1, variant.lora_rank),
        objective=options.objective,
        recompute=options.recompute,
        dtype="bf16" if options.compute_dtype == "bfloat16" else "fp32",
    )


def steps_of(preset: Preset, variant: Variant, options: TrainOptions) -> int | None:
    """The outer steps of a variant; None if nobody knows before the data is there."""
    if options.steps:
        return options.steps
    task = preset.tasks[variant.task]
    examples = task.train or SOURCES[task.source].paper.get("train")
    return None if examples is None else math.ceil(examples / options.contexts)


def _hours(hours: float) -> str:
    return f"{hours:.2g}"
