"""What a process of its own does for ``benchmarks.compare``: a gate, or a way's memory and time."""

from __future__ import annotations

import functools
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from gdprompt_fast import reference_meta_step
from gdprompt_fast.models.memory import model_tensors
from gdprompt_fast.ops.backend import resolve_backend
from gdprompt_fast.reference.compare import Gradients, gradients_of, without_upcasts, worst_error
from gdprompt_fast.reference.lean_maml import LeanMAML

from ..harness.isolate import is_out_of_memory
from ..harness.rows import Row
from ..harness.timing import measure_memory, quantiles, release, seconds_of
from .baselines import FIRST_ORDER, WAYS, Way, ordinary
from .cases import RESPONSE_TOKENS, TINY, Case, random_batch, random_model, self_teacher
from .flops import passes_of

ALLOWED_ERROR = 1e-4  # of a meta-gradient in fp32; the first-order one is off by more than 1e-2
LEAST_ROUNDS, MOST_ROUNDS = 3, 20


@dataclass(frozen=True)
class Settings:
    """How to measure; the same for a whole run."""

    device: str
    dtype: str
    threads: int
    seconds: float
    memory_limit_bytes: int
    tiny: bool


def task_of(case: Case, device: torch.device, dtype: torch.dtype, **options: Any) -> LeanMAML:
    model = random_model(case, device, dtype)
    batch = random_batch(case, device)
    return LeanMAML(
        model, batch, self_teacher(model, batch), inner_params=case.inner_params, **options
    )


def gate_of(case: Case) -> Case:
    """A tiny case of the same kind."""
    return replace(TINY, rank=min(case.rank, 2), inner_params=case.inner_params)


def gate_name(case: Case) -> str:
    return f"tiny, LoRA outside, {case.inner_params} inside" if case.rank else "tiny"


def gradients_by(way: Way, task: LeanMAML) -> Gradients:
    """What a way alone adds to ``.grad``."""
    task.model.zero_grad(set_to_none=True)
    way(task)
    named = task.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def gate(case: Case, way: str, settings: Settings) -> Row:
    """The error of a way's gradient in fp32 against the reference's in fp64."""
    device = torch.device(settings.device)
    task = task_of(case, device, torch.float32, inner_lr=0.05)
    got = gradients_by(WAYS[way], task)
    wide = task_of(case, device, torch.float64)
    wide.model.load_state_dict(task.model.state_dict())
    teacher = task.teacher
    assert teacher is not None and teacher.hidden is not None and teacher.head is not None
    wide_teacher = replace(teacher, hidden=teacher.hidden.double(), head=teacher.head.double())
    with without_upcasts(wide.model):
        _, exact = gradients_of(
            reference_meta_step,
            wide.model,
            task.batch,
            inner_lr=task.inner_lr,
            inner_params=case.inner_params,
            teacher=wide_teacher,
            first_order=way in FIRST_ORDER,
        )
    error, name = worst_error(got, exact)
    passed = error <= ALLOWED_ERROR
    status = "passed" if passed else f"failed: wrong in {name}"
    return dict(error=error, dtype="float32", status=status)


def measure(case: Case, way: str, settings: Settings) -> Row:
    """Memory, then time in turns with the ordinary step."""
    device = torch.device(settings.device)
    dtype = getattr(torch, settings.dtype)
    task = task_of(case, device, dtype)
    tensors = model_tensors(task.model)

    memory = measure_memory(device, functools.partial(WAYS[way], task), tensors)
    row: Row = dict(
        backend=resolve_backend("auto", device, dtype) if way.startswith("fast") else "torch",
        peak_bytes=memory["peak_bytes"] - memory["held_bytes"],
        process_peak_bytes=process_peak(device),
        flops=flops_of(case, way, task),
        ceiling_flops_per_s=matrix_rate(device, settings),
    )
    times_ms, ordinary_ms = in_turns(device, task, way, settings.seconds)
    row |= quantiles(times_ms)
    seconds = row["median_ms"] / 1e3
    if ordinary_ms:
        row["ordinary_ms"] = statistics.median(ordinary_ms)
        ratios = [t / base for t, base in zip(times_ms, ordinary_ms, strict=True)]
        row["ratio_to_ordinary"] = statistics.median(ratios)
    row["tokens_per_s"] = case.examples * (case.context_tokens + case.query_tokens) / seconds
    row["flop_utilisation"] = row["flops"] / seconds / row["ceiling_flops_per_s"]
    return {**row, "status": "measured"}


def in_turns(
    device: torch.device, task: LeanMAML, way: str, seconds: float
) -> tuple[list[float], list[float]]:
    """Milliseconds of a way and of the ordinary step after it, as many rounds as fit; at least
    three, or one where there is no time.

    Where only the ordinary step runs out of memory, its list is empty.
    """
    step, base = functools.partial(WAYS[way], task), functools.partial(ordinary, task)
    with_base = way == "ordinary" or fits(device, base)
    times: list[float] = []
    base_times: list[float] = []
    end = time.perf_counter() + seconds
    least = LEAST_ROUNDS if seconds else 1
    while len(times) < least or (time.perf_counter() < end and len(times) < MOST_ROUNDS):
        times.append(1e3 * seconds_of(device, step))
        if way == "ordinary":
            base_times.append(times[-1])
        elif with_base:
            base_times.append(1e3 * seconds_of(device, base))
    return times, base_times


def fits(device: torch.device, call: Callable[[], object]) -> bool:
    """Whether there is memory for a call; also its warm-up."""
    try:
        call()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        release(device)
    return True


def process_peak(device: torch.device) -> int:
    """The most that the process held: resident, or reserved on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flops_of(case: Case, way: str, task: LeanMAML) -> float:
    """What a step must compute, whatever the way computes: the passes of :func:`passes_of` of the
    matrices, the head only where there are logits to make (every token of a context, the predicted
    ones of a query), and causal attention to T tokens as hidden · T more a layer.
    """
    per_context, per_query = passes_of(way, bool(case.rank))
    tokens, asked = case.context_tokens, case.query_tokens
    texts = [(per_context, tokens, tokens), (per_query, asked, RESPONSE_TOKENS)]
    if way == "ordinary":
        texts = [(per_query, tokens + asked, tokens + asked)]
    matrices = sum(p.numel() for p in task.model.parameters() if p.dim() == 2)
    head = case.config.vocab_size * case.config.hidden_size  # tied to the embedding
    width = case.config.num_hidden_layers * case.config.hidden_size
    return float(
        sum(
            2 * n * case.examples * (text * (matrices - head + width * text) + predicted * head)
            for n, text, predicted in texts
        )
    )


def matrix_rate(device: torch.device, settings: Settings) -> float:
    """FLOP/s of a large product of random numbers, the best of five."""
    size = 32 if settings.tiny else 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, settings.dtype))
    return 2 * size**3 / min(seconds_of(device, lambda: a @ b) for _ in range(5))


def work(kind: str, case: Case, way: str, settings: Settings) -> Row:
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' own
    torch.set_num_threads(settings.threads)
    return {"gate": gate, "time": measure}[kind](case, way, settings)
