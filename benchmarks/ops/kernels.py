"""Gates and times of every pass of every Triton kernel, and of what is made of them."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gdprompt_fast.ops import backend
from gdprompt_fast.testing.gates import Verdict, judge, tensors_in, widened
from gdprompt_fast.testing.op_inputs import PASS_NAMES, PASSES, Shape, drawer, flops

from ..harness.bench import Bench
from ..harness.jobs import Gate, Job, job
from ..harness.rows import Row
from ..harness.timing import measure_pass
from .composites import COMPOSITES
from .shapes import odd_shapes, timed_shapes

WORKER = "kernels"
PLAIN_ATTENTION = ("contexts",)  # at thousands of tokens it takes most of a second
DTYPES = (torch.float32, torch.bfloat16)  # of the gates; times are in bf16


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# Ceilings


def copy_ceiling(bench: Bench) -> Row:
    """Bytes read and written per second by a copy between two buffers far larger than the L2."""
    size = 1 << 16 if bench.tiny else 1 << 32
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return _rate(bench, lambda: target.copy_(source), [source, target], 2 * size)


def matrix_ceiling(bench: Bench) -> Row:
    """FLOP/s of a large bf16 product of random numbers (of zeros it would be faster)."""
    size = 32 if bench.tiny else 8192
    draw = drawer(bench.device, torch.bfloat16)
    a, b = draw(size, size), draw(size, size)
    return _rate(bench, lambda: a @ b, [a, b], 2.0 * size**3)


def _rate(bench: Bench, call: Callable[[], object], present: list[Tensor], work: float) -> Row:
    measured = measure_pass(bench.device, call, present, rep_ms=300)
    return {**timed(bench, measured, work), "ceiling_ratio": 1.0}


def timed(bench: Bench, measured: Row, work: float) -> Row:
    """With bytes or FLOPs per second."""
    rate = work / (1e-3 * measured["median_ms"])
    return {**measured, "rate": rate, "status": bench.timed_status}


def ceiling_jobs(bench: Bench) -> Iterator[Job]:
    for name, run, dtype in (
        ("matrix", matrix_ceiling, "bfloat16"),
        ("copy", copy_ceiling, "uint8"),
    ):
        yield job(
            functools.partial(run, bench),
            "main",
            section="ceiling",
            kind="ceiling",
            op=name,
            pass_="forward",
            provider="torch",
            case=name,
            dtype=dtype,
            shapes={},
            ceiling=name,
        )


# Passes


def gate_row(verdict: Verdict) -> Row:
    return dict(
        error=verdict.error,
        eager_error=verdict.plain_error,
        allowed_error=verdict.allowed,
        status=verdict.status,
    )


def gate_pass(bench: Bench, op: str, pass_: str, shape: Shape, dtype: torch.dtype) -> Row:
    plain_pass = getattr(importlib.import_module(f"gdprompt_fast.ops.eager.{op}"), pass_)
    kernel_pass = getattr(importlib.import_module(f"gdprompt_fast.kernels.{op}"), pass_)

    def arguments() -> tuple[Any, ...]:
        """Drawn again each time: some passes work in place."""
        return PASSES[op](drawer(bench.device, dtype), shape)[pass_]

    exact = plain_pass(*map(widened, arguments()))
    return gate_row(judge(kernel_pass(*arguments()), plain_pass(*arguments()), exact))


def time_pass(bench: Bench, op: str, pass_: str, shape: Shape, provider: str) -> Row:
    package = "gdprompt_fast.kernels" if provider == "triton" else "gdprompt_fast.ops.eager"
    function = getattr(importlib.import_module(f"{package}.{op}"), pass_)
    arguments = PASSES[op](drawer(bench.device, torch.bfloat16), shape)[pass_]
    inputs = tensors_in(arguments)
    work = flops(op, pass_, shape)
    if work is None:
        work = bytes_of(inputs) + bytes_of(tensors_in(function(*arguments)))
    return timed(bench, measure_pass(bench.device, lambda: function(*arguments), inputs), work)


def ceiling_of(op: str) -> str:
    return "matrix" if op in ("linear", "attention", *COMPOSITES) else "copy"


def _gate_jobs(
    run: Callable[..., Row], bench: Bench, op: str, shapes: dict[str, Shape], passes: Iterable[str]
) -> Iterator[Job]:
    for (name, shape), dtype, pass_ in itertools.product(shapes.items(), DTYPES, passes):
        yield job(
            functools.partial(run, bench, op, pass_, shape, dtype),
            section="kernel",
            kind="gate",
            op=op,
            pass_=pass_,
            provider="triton",
            case=name,
            shapes=shape,
            dtype=dtype_name(dtype),
        )


def _time_jobs(
    run: Callable[..., Row], bench: Bench, op: str, passes: Iterable[str], kernels: Iterable[Gate]
) -> Iterator[Job]:
    """Ours, made of these kernels, are timed if those passed too."""
    for (name, shape), pass_, provider in itertools.product(
        timed_shapes(op, bench.tiny).items(), passes, ("triton", "eager")
    ):
        if (op, provider) == ("attention", "eager") and name not in PLAIN_ATTENTION:
            continue
        yield job(
            functools.partial(run, bench, op, pass_, shape, provider),
            WORKER,
            [(op, pass_), *kernels] if provider == "triton" else [],
            section="kernel",
            kind="time",
            op=op,
            pass_=pass_,
            provider=provider,
            case=name,
            shapes=shape,
            dtype="bfloat16",
            ceiling=ceiling_of(op),
        )


def _pass_gates(bench: Bench) -> Iterator[Job]:
    """Attention first: it takes the longest to compile."""
    for op in sorted(backend.KERNELS, key=lambda name: name != "attention"):
        shapes = {**timed_shapes(op, bench.tiny), **odd_shapes(op, bench.tiny)}
        yield from _gate_jobs(gate_pass, bench, op, shapes, PASS_NAMES[op])


def _pass_times(bench: Bench) -> Iterator[Job]:
    for op in PASSES:
        if op in backend.KERNELS:
            yield from _time_jobs(time_pass, bench, op, PASS_NAMES[op], ())


# Matrix products with kernels between them


def gate_composite(bench: Bench, op: str, pass_: str, shape: Shape, dtype: torch.dtype) -> Row:
    results = []
    for on, wide in (("triton", False), ("torch", False), ("torch", True)):
        draw = drawer(bench.device, dtype)
        made = (lambda *s, d=draw: d(*s).double()) if wide else draw
        with backend.use_backend(on):
            results.append(COMPOSITES[op].calls(made, shape)[pass_]())
    return gate_row(judge(*results))


def time_composite(bench: Bench, op: str, pass_: str, shape: Shape, provider: str) -> Row:
    with backend.use_backend("triton" if provider == "triton" else "torch"):
        call = COMPOSITES[op].calls(drawer(bench.device, torch.bfloat16), shape)[pass_]
        measured = measure_pass(bench.device, call, [])
    return timed(bench, measured, COMPOSITES[op].flops(pass_, shape))


def _composite_gates(bench: Bench) -> Iterator[Job]:
    for op, composite in COMPOSITES.items():
        shapes = odd_shapes(op, bench.tiny)
        yield from _gate_jobs(gate_composite, bench, op, shapes, composite.names)


def _composite_times(bench: Bench) -> Iterator[Job]:
    for op, composite in COMPOSITES.items():
        kernels = [(composite.kernels, name) for name in PASS_NAMES[composite.kernels]]
        yield from _time_jobs(time_composite, bench, op, composite.names, kernels)


def kernel_gates(bench: Bench) -> Iterator[Job]:
    yield from _pass_gates(bench)
    yield from _composite_gates(bench)


def kernel_times(bench: Bench) -> Iterator[Job]:
    yield from _pass_times(bench)
    yield from _composite_times(bench)
