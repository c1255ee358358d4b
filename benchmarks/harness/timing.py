"""Time and memory of calls."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gdprompt_fast.models.memory import PeakMemory

from .rows import Row

Call = Callable[[], object]


def release(device: torch.device) -> None:
    """Frees what the last case left, also in reference cycles of autograd."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure_memory(device: torch.device, call: Call, present: list[Tensor]) -> Row:
    """The peak of one call, with what was there before; on a GPU of the second call, so that the
    first one compiles and allocates the workspaces of libraries.
    """
    release(device)
    if device.type == "cuda":
        call()
        release(device)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "held_bytes": held}
    memory = PeakMemory(present)
    held = memory.live_bytes
    with memory:
        call()
    return {"peak_bytes": memory.peak_bytes, "held_bytes": held}


def seconds_of(device: torch.device, call: Call) -> float:
    """Wall-clock time of one call that is waited for."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quantiles(times_ms: Sequence[float]) -> Row:
    """The time columns of a row."""
    ordered = sorted(times_ms)
    last = len(ordered) - 1
    return {
        "p20_ms": ordered[math.floor(0.2 * last)],
        "median_ms": statistics.median(ordered),
        "p80_ms": ordered[math.ceil(0.8 * last)],
        "repeats": len(ordered),
    }


def measure_pass(
    device: torch.device, call: Call, present: list[Tensor], rep_ms: float = 100.0
) -> Row:
    """Memory, which warms up, then the time of a call that takes microseconds to milliseconds: on a
    GPU by triton's do_bench, which empties the L2 before each; on a CPU of the one call.
    """
    start = time.perf_counter()
    memory = measure_memory(device, call, present)
    if device.type != "cuda":
        return {**memory, **quantiles([1e3 * (time.perf_counter() - start)])}
    from triton.testing import do_bench

    times = do_bench(call, warmup=10, rep=rep_ms, return_mode="all")
    return {**memory, **quantiles(times)}


def measure_step(
    device: torch.device, call: Call, present: list[Tensor], seconds: float, least: int, most: int
) -> Row:
    """Peak memory and times of as many calls as fit into ``seconds``, after one to warm up; on a
    GPU the time between events around a call, and ``cpu_ms`` until the call returns.
    """
    if device.type != "cuda":
        return measure_pass(device, call, present)
    call()
    release(device)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    cpu_times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < most):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start = time.perf_counter()
        before.record()
        call()
        after.record()
        cpu_times.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after))
    return dict(
        peak_bytes=torch.cuda.max_memory_allocated(),
        held_bytes=held,
        reserved_bytes=torch.cuda.max_memory_reserved(),
        cpu_ms=statistics.median(cpu_times),
        **quantiles(times),
    )
