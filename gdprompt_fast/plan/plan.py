"""A memory plan: predictions of three methods to take the step, and the batches that fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from ..artifacts.markdown import markdown_table
from ..artifacts.progress import progress_bar
from ..errors import UserError
from .prediction import (
    PARTS,
    Materialised,
    Prediction,
    predict,
    predict_materialised,
    predict_sequential,
)
from .step import PlannedStep

LARGEST_BATCH = 4096  # no larger one is looked for
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Plan:
    """What a step needs, by the engine and by two other methods.

    Attributes:
        memory: bytes to fit into; None if none were given.
        largest_batch: of ``fast_meta_step`` in ``memory``; None without it.
        largest_micro_batch: so many examples of the planned batch at a time fit, 0 if not even one
            does; None without ``memory``.
    """

    planned: PlannedStep
    fast: Prediction
    sequential: Prediction
    materialised: Materialised
    memory: int | None
    largest_batch: int | None
    largest_micro_batch: int | None

    @property
    def copy_bytes(self) -> int:
        """What one more example of the materialised method takes: θ' and its graph."""
        return sum(self.materialised.copy.values())

    @property
    def shared_bytes(self) -> int:
        """What the materialised method needs beside its copies."""
        return sum(self.materialised.two.meta_step.values()) - 2 * self.copy_bytes


def parse_memory(text: str) -> int:
    """The bytes of ``80GB`` or ``24 GiB``.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise UserError(f"memory: expected a size in {', '.join(_UNITS)} as 80GB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def make_plan(config: PreTrainedConfig, planned: PlannedStep, memory: int | None = None) -> Plan:
    """Predicts all of it; in seconds.

    Raises:
        ValueError: if the step does not fit the model, or the model is of an unknown
            architecture.
    """
    runs = 3 if memory is None else 5  # two batches, the answer, and the other two methods
    with progress_bar(runs, "planning", "run", leave=False, delay=2.0) as bar:

        def run(batch: int) -> Prediction:
            prediction = predict(config, replace(planned, batch=batch))
            bar.update()
            return prediction

        fast = run(planned.batch)
        sequential = predict_sequential(config, planned)
        bar.update()
        materialised = predict_materialised(config, planned)
        bar.update()
        largest = micro = None
        if memory is not None:
            peaks = {planned.batch: fast.peak_bytes}
            largest = largest_batch(lambda batch: run(batch).peak_bytes, peaks, memory)
            micro = largest_micro_batch(config, planned, memory, fast.peak_bytes)
    return Plan(planned, fast, sequential, materialised, memory, largest, micro)


def largest_micro_batch(
    config: PreTrainedConfig, planned: PlannedStep, memory: int, peak: int | None = None
) -> int:
    """The most examples of a batch at a time whose peak is at most ``memory``; 0 if not even one's
    is.

    Args:
        peak: of the planned step, if it is known.
    """

    def peak_at(size: int) -> int:
        return predict(config, replace(planned, micro_batch=size)).peak_bytes

    most = planned.micro_batch or planned.batch
    peaks = {most: peak_at(most) if peak is None else peak}
    if peaks[most] <= memory:
        return most
    return largest_batch(peak_at, peaks, memory)


def largest_batch(peak_at: Callable[[int], int], peaks: dict[int, int], memory: int) -> int:
    """The largest batch whose peak is at most ``memory``; 0 if none is.

    A peak is the largest of those of some moments, each about affine in the batch (but for blocks
    whose size depends on it, which shows in tiny models), so it is taken for convex: the line
    through two batches that fit is below it beyond them. The answer is itself predicted.

    Args:
        peak_at: predicts the peak of a batch.
        peaks: at least one peak that is known already, by batch; it is added to.
        memory: bytes.
    """
    while True:
        known = sorted(peaks.items())
        fitting = [(batch, peak) for batch, peak in known if peak <= memory]
        fits = fitting[-1][0] if fitting else 0
        if fits >= LARGEST_BATCH:
            return fits
        over = known[len(fitting)][0] if len(fitting) < len(known) else LARGEST_BATCH + 1
        if over == fits + 1:
            return fits
        if len(fitting) > 1 and _reaches(fitting[-2:], memory) <= fits:
            return fits
        guess = 2 * fits or over // 2
        if len(known) > 1:
            last = max(0, min(len(fitting) - 1, len(known) - 2))
            guess = _reaches(known[last : last + 2], memory)
        guess = min(max(guess, fits + 1), over - 1)
        peaks[guess] = peak_at(guess)


def _reaches(two: list[tuple[int, int]], memory: int) -> int:
    """The largest batch at which the line through two batches and their peaks is at most
    ``memory``.
    """
    (first, low), (second, high) = two
    if high <= low:
        return LARGEST_BATCH
    return first + (memory - low) * (second - first) // (high - low)


def plan_table(name: str, plan: Plan) -> str:
    """The plan in words and two Markdown tables."""
    planned, fast = plan.planned, plan.fast
    compute = "float32" if planned.dtype == "fp32" else "bfloat16"
    parts = [["at the peak of", "the meta step", "the optimizer's step"]]
    for part in PARTS:
        cells = [fast.meta_step.get(part, 0), fast.optimizer_step.get(part, 0)]
        parts.append([part, *map(size_text, cells)])
    totals = [sum(fast.meta_step.values()), sum(fast.optimizer_step.values())]
    parts.append(["**all**", *map(size_text, totals)])
    return "\n".join(
        [
            f"{name}: {plan.fast.parameters / 1e6:,.0f} M parameters; batch {planned.batch}, "
            f"{_at_a_time(planned)}{planned.context} tokens of context, "
            f"{planned.query} of query and response",
            f"inner {planned.inner}, outer {planned.outer}, {planned.optimizer}, computing in "
            f"{compute}; predicted from shapes, not measured:",
            "",
            markdown_table(parts),
            "",
            markdown_table(_methods(plan)),
            "",
            *_notes(plan),
        ]
    )


def _methods(plan: Plan) -> list[list[str]]:
    batch = plan.planned.batch
    methods = {
        "**`fast_meta_step`**": plan.fast,
        "sequential exact loop": plan.sequential,
        "all adapted copies at once": plan.materialised.at(batch),
    }
    if plan.memory is None:
        return [["method", "predicted peak"]] + [
            [method, size_text(prediction.peak_bytes)] for method, prediction in methods.items()
        ]
    one_copy = plan.materialised.one.peak_bytes <= plan.memory
    copies = (plan.memory - plan.shared_bytes) // plan.copy_bytes
    largest = [
        _at_most(plan.largest_batch or 0),
        "any" if plan.sequential.peak_bytes <= plan.memory else "0",
        _at_most(max(1, copies)) if one_copy else "0",
    ]
    return [["method", "predicted peak", f"largest batch in {size_text(plan.memory)}"]] + [
        [method, size_text(prediction.peak_bytes), most]
        for (method, prediction), most in zip(methods.items(), largest, strict=True)
    ]


def _notes(plan: Plan) -> list[str]:
    notes = [
        "The other two are exact MAML by autograd's double backward, written to be lean; "
        f"all copies at once need {size_text(plan.shared_bytes)} + batch × "
        f"{size_text(plan.copy_bytes)}."
    ]
    if plan.memory is not None:
        micro = plan.largest_micro_batch or 0
        of_batch = f"of the batch of {plan.planned.batch} at a time (--micro-batch)"
        most = f"At most {micro} examples" if micro else "Not even one example"
        notes.append(f"{most} {of_batch} fit{'' if micro else 's'} in {size_text(plan.memory)}.")
    if plan.planned.objective == "kl":
        notes.append("The teacher's head and final states are counted, its other weights are not.")
    notes.append(
        "Captured steps, on a GPU, keep their memory between steps: "
        f"{size_text(plan.fast.captured_peak_bytes)} with this optimizer, "
        f"{size_text(sum(plan.fast.meta_step.values()))} with one that makes no temporaries "
        "(fused)."
    )
    notes.append("Not counted: the CUDA context, and what the allocator holds in reserve.")
    return notes


def _at_a_time(planned: PlannedStep) -> str:
    return f"{planned.micro_batch} at a time, " if planned.micro_batch else ""


def plan_json(name: str, plan: Plan) -> dict[str, Any]:
    """The numbers, in bytes."""
    methods = {
        "fast_meta_step": plan.fast,
        "sequential": plan.sequential,
        "materialised": plan.materialised.at(plan.planned.batch),
    }
    return {
        "model": name,
        "parameters": plan.fast.parameters,
        **asdict(plan.planned),
        "predicted": {
            method: {"peak_bytes": prediction.peak_bytes, **asdict(prediction)}
            for method, prediction in methods.items()
        },
        "memory_bytes": plan.memory,
        "largest_batch": plan.largest_batch,
        "largest_micro_batch": plan.largest_micro_batch,
    }


def size_text(size: float) -> str:
    """Bytes in MB or GB."""
    if size < 1e9:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.2f} GB" if size < 100e9 else f"{size / 1e9:,.0f} GB"


def _at_most(batch: int) -> str:
    return f"{LARGEST_BATCH} or more" if batch >= LARGEST_BATCH else str(batch)
