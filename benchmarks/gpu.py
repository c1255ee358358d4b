"""Checks, times and measures the Triton kernels and the whole step on a GPU, in at most 9 minutes.

    python benchmarks/gpu.py             # needs a CUDA machine; appends to results/gpu.jsonl
    python benchmarks/gpu.py --tiny      # the same code on a CPU in Triton's interpreter, tiny
    shapes; the timings mean nothing, and tests/triton_interpreter.py makes bf16 right

Ceilings first: the copy bandwidth and the matrix rate that every other number is a ratio of. Then
every pass of every kernel in ``gdprompt_fast.ops.backend.KERNELS``: the gate, its error against
fp64 at most twice that of the plain passes plus a floor, and, only if the gate passed, its time
beside theirs at the shapes of Llama 3.2 1B. Then, likewise, what is matrix products with some of
those passes between them: the inner-updated linear layer and the losses at the vocabulary. Then the
whole step, gated on a tiny model.

The work is a fixed list of cases. A worker process announces each before it starts and appends its
row when it is done; this process waits. A case that crashes the worker or hangs becomes a row, and
a new worker goes on behind it: out of memory, out of time, crashed and failed are rows, never
missing ones.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before triton is imported, torch's own import of it too.
os.environ["TRITON_INTERPRET"] = (
    "1" if "--tiny" in sys.argv else os.environ.get("TRITON_INTERPRET", "0")
)
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # the package need not be installed

import argparse
import functools
import gc
import importlib
import importlib.metadata
import itertools
import json
import math
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import cases
import torch
from cases import random_batch, random_model, self_teacher
from measuring import (
    Row,
    append,
    measure_memory,
    quantiles,
    release,
    revision,
    rows_of,
    seconds_of,
)
from torch import Tensor
from tqdm import tqdm

from gdprompt_fast import TeacherTargets, fast_meta_step, reference_meta_step
from gdprompt_fast.models.memory import model_tensors
from gdprompt_fast.ops import backend
from gdprompt_fast.ops.attention import visible_keys
from gdprompt_fast.ops.gradient import WeightGradient
from gdprompt_fast.ops.linear import Factor, InnerLinear, Use
from gdprompt_fast.ops.phase import Phase
from gdprompt_fast.ops.rate import Rate
from gdprompt_fast.ops.vocabulary import TeacherTarget, Vocabulary
from gdprompt_fast.ops.vocabulary.passes import (
    adjoint_pass,
    context_pass,
    response_pass,
    state_gradient,
)
from gdprompt_fast.ops.vocabulary.state import Lookup
from gdprompt_fast.reference.compare import gradients_of, without_upcasts, worst_error
from gdprompt_fast.rows import GroupedRows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"
SECTION_END_S = {"ceiling": 120, "kernel": 340, "step": 480}  # no case of it starts later than this
TOTAL_S = 500  # then the case that runs is ended
CASE_LIMIT_S = 120  # a case that takes longer hangs
FLUSH_BYTES = 1 << 30  # written before every timed call: empties the L2, lets the CPU run ahead
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
GOOD = ("measured", "passed", "interpreter")

Shape = dict[str, int]
Passes = dict[str, tuple[Any, ...]]  # the arguments of every pass
Draw = Callable[..., Tensor]

EMPTY: Row = {
    **dict.fromkeys(("section", "kind", "op", "pass", "provider", "case", "shapes", "dtype")),
    **dict.fromkeys(("status", "p20_ms", "median_ms", "p80_ms", "repeats")),
    **dict.fromkeys(("peak_bytes", "held_bytes", "ceiling", "rate", "ceiling_ratio")),
    **dict.fromkeys(("error", "eager_error", "allowed_error")),
}

UP = dict(groups=16, rows=32, inputs=2048, outputs=8192, context=256)
DOWN = dict(groups=16, rows=32, inputs=8192, outputs=2048, context=256)
LORA_A = dict(groups=16, rows=16, tokens=256, inputs=2048, outputs=16)
LORA_B = {**LORA_A, "inputs": 16, "outputs": 8192}
HEADS = dict(heads=32, kv_heads=8, dim=64)
# Of Llama 3.2 1B: 16 examples of 256 context tokens and 32 query tokens.
TIMED: dict[str, dict[str, Shape]] = {
    "linear": {
        "queries up": UP,
        "queries down": DOWN,
        "queries up, backward": {**DOWN, "transposed": 1},
        "queries down, backward": {**UP, "transposed": 1},
        "queries square": {**UP, "outputs": 2048},
        "queries narrow": {**UP, "outputs": 512},
        "contexts up": {**UP, "rows": 256},
    },
    "attention": {
        "contexts": dict(batch=16, tokens=256, **HEADS),
        "one text of 4096 tokens": dict(batch=1, tokens=4096, **HEADS),
        "one text of 8192 tokens": dict(batch=1, tokens=8192, **HEADS),
        "contexts packed into one row": dict(batch=1, tokens=4096, segments=16, **HEADS),
    },
    "lora": {
        "contexts, A": LORA_A,
        "contexts, B": LORA_B,
        "queries, A": {**LORA_A, "tokens": 32},
        "queries, B": {**LORA_B, "tokens": 32},
    },
    "norm": {
        "contexts": dict(examples=16, tokens=256, hidden=2048),
        "queries": dict(examples=16, tokens=32, hidden=2048),
    },
    "swiglu": {
        "contexts": dict(examples=16, tokens=256, hidden=8192),
        "queries": dict(examples=16, tokens=32, hidden=8192),
    },
    "gelu": {
        "contexts": dict(examples=16, tokens=256, hidden=8192),
        "contexts, tanh": dict(examples=16, tokens=256, hidden=8192, tanh=1),
    },
    "rotary": {
        "contexts": dict(batch=16, tokens=256, **HEADS),
        "queries": dict(batch=16, tokens=32, **HEADS),
    },
    "vocabulary": {
        "a tile of contexts": dict(groups=16, rows=256, columns=4096, hidden=2048),
        "a tile of responses": dict(groups=16, rows=32, columns=4096, hidden=2048),
    },
    "inner_linear": {
        "queries up": UP,
        "queries down": DOWN,
        "contexts up": {**UP, "rows": 256},
    },
    "losses": {
        "contexts and responses": dict(
            groups=16, rows=256, responses=32, hidden=2048, vocabulary=128256
        )
    },
}
ODD: dict[str, dict[str, Shape]] = {  # for the gate only
    "linear": {
        "odd": dict(groups=3, rows=7, inputs=41, outputs=17, context=5, bias=1),
        "one row": dict(groups=2, rows=1, inputs=40, outputs=70, context=1, transposed=1),
    },
    "attention": {  # few: in fp32 each takes half a minute to compile
        "odd": dict(batch=2, heads=6, kv_heads=2, tokens=37, dim=20),
        "odd, window": dict(batch=1, heads=3, kv_heads=1, tokens=131, dim=64, window=40),
        "odd, segments": dict(batch=2, heads=2, kv_heads=2, tokens=131, dim=96, segments=3),
    },
    "lora": {
        "odd, groups of 0 to 3 rows": dict(groups=4, rows=5, tokens=37, inputs=401, outputs=3),
        "rank 1, one token": dict(groups=3, rows=3, tokens=1, inputs=1, outputs=70, transposed=1),
    },
    "norm": {
        "odd": dict(examples=3, tokens=5, hidden=401),
        "odd, layer norm": dict(examples=2, tokens=7, hidden=401, center=1),
        "one token": dict(examples=2, tokens=1, hidden=64),
    },
    "swiglu": {"odd": dict(examples=3, tokens=1, hidden=401)},
    "gelu": {
        "odd": dict(examples=3, tokens=1, hidden=401),
        "odd, tanh": dict(examples=3, tokens=1, hidden=401, tanh=1),
    },
    "rotary": {
        "odd": dict(batch=2, heads=6, kv_heads=2, tokens=37, dim=20),
        "part of each head": dict(batch=3, heads=5, kv_heads=5, tokens=1, dim=80, rotated=20),
    },
    "vocabulary": {
        "odd": dict(groups=3, rows=7, columns=401, hidden=41),
        "own columns": dict(groups=3, rows=1, columns=5000, hidden=8, own=1),
    },
    "inner_linear": {
        "odd": dict(groups=3, rows=7, inputs=41, outputs=17, context=5, bias=1),
        "odd, forms the update": dict(groups=2, rows=31, inputs=3, outputs=4, context=29),
    },
    "losses": {"odd": dict(groups=3, rows=7, responses=5, hidden=41, vocabulary=401)},
}
TINY = dict(groups=2, rows=5, inputs=32, outputs=48, context=6, examples=2, tokens=9, hidden=64)
TINY |= dict(batch=1, heads=2, kv_heads=1, dim=16, window=5, segments=2, rotated=6)
TINY |= dict(columns=70, responses=3, vocabulary=70)


@dataclass
class Bench:
    """What the cases share. ``rows`` are those of this run so far, also of earlier workers."""

    device: torch.device
    tiny: bool
    rows: list[Row]

    @property
    def timed_status(self) -> str:
        return "interpreter" if self.tiny else "measured"

    def shapes(self, table: dict[str, dict[str, Shape]], op: str) -> dict[str, Shape]:
        """Of those that are timed, a tiny run takes the first: the others differ in size only."""
        if not self.tiny:
            return table[op]
        return {
            name: {key: min(size, TINY.get(key, size)) for key, size in shape.items()}
            for name, shape in list(table[op].items())[: 1 if table is TIMED else None]
        }

    def ceiling(self, name: str) -> float | None:
        """Bytes or FLOPs per second."""
        found = [r["rate"] for r in self.rows if r["kind"] == "ceiling" and r["op"] == name]
        return found[-1] if found else None

    def failed_gates(self, op: str, pass_: str) -> list[Row]:
        gates = [row for row in self.rows if row["kind"] == "gate" and row["op"] == op]
        return [row for row in gates if row["pass"] == pass_ and row["status"] != "passed"]


@dataclass
class Case:
    """A row to be: what is known before, and a function that returns the rest."""

    row: Row
    run: Callable[[], Row]


def case(section: str, kind: str, op: str, run: Callable[[], Row], **row: Any) -> Case:
    return Case({**EMPTY, "section": section, "kind": kind, "op": op, **row}, run)


# Inputs of every pass


def drawer(device: torch.device, dtype: torch.dtype) -> Draw:
    """``draw(*shape)``: a normal sample on the device."""
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return draw


def linear_passes(draw: Draw, shape: Shape) -> Passes:
    groups, rows, inputs, outputs, context = (shape[name] for name in UP)
    x = draw(groups, rows, inputs)
    weight = draw(inputs, outputs).T if shape.get("transposed") else draw(outputs, inputs)
    bias = draw(outputs) if shape.get("bias") else None
    match, factor = draw(groups, rows, context), draw(groups, context, outputs)
    return {"updated_product": (x, weight, bias, match, factor)}


def lora_passes(draw: Draw, shape: Shape) -> Passes:
    """Every group has a weight of its own; rows that are no more than the groups have one each."""
    groups, rows, tokens, inputs, outputs = (shape[name] for name in LORA_A)
    weight = draw(inputs, outputs).T if shape.get("transposed") else draw(outputs, inputs)
    own = weight.float() + draw(groups, outputs, inputs).float()
    x, e = draw(rows, tokens, inputs), draw(rows, tokens, outputs)
    group = torch.arange(rows, device=x.device)
    grouped = GroupedRows(group if rows <= groups else group**2 % groups, groups)
    return {
        "lora_product": (x, weight, own, grouped),
        "lora_materialise": (own, e, x, grouped, -0.3),
    }


def norm_passes(draw: Draw, shape: Shape) -> Passes:
    """Every example has a weight of its own, as after an inner step."""
    eager = importlib.import_module("gdprompt_fast.ops.eager.norm")
    examples, tokens, hidden = shape["examples"], shape["tokens"], shape["hidden"]
    x, dy, u = (draw(examples, tokens, hidden) for _ in range(3))
    weight, v, w = (draw(examples, hidden) for _ in range(3))
    center = bool(shape.get("center"))
    bias = draw(examples, hidden) if center else None
    forward = (2 * x + 0.5, weight, bias, 1e-5, center)
    backward = (dy, forward[0], weight, *eager.norm_forward(*forward)[1:])
    return {
        "norm_forward": forward,
        "norm_backward": (*backward, center),
        "norm_double_backward": (u, v, w if center else None, *backward),
    }


def swiglu_passes(draw: Draw, shape: Shape) -> Passes:
    size = shape["examples"], shape["tokens"], shape["hidden"]
    gate, up, dy, a, b = (draw(*size) for _ in range(5))
    return {
        "swiglu_forward": (gate, up),
        "swiglu_backward": (dy, gate, up),
        "swiglu_double_backward": (a, b, dy, gate, up),
    }


def gelu_passes(draw: Draw, shape: Shape) -> Passes:
    x, dy, a = (draw(shape["examples"], shape["tokens"], shape["hidden"]) for _ in range(3))
    approximate = "tanh" if shape.get("tanh") else "none"
    return {
        "gelu_forward": (x, approximate),
        "gelu_backward": (dy, x, approximate),
        "gelu_double_backward": (a, dy, x, approximate),
    }


def rotary_passes(draw: Draw, shape: Shape) -> Passes:
    """q and k as a model has them: [B, T, H, D] in memory."""
    batch, tokens, dim = shape["batch"], shape["tokens"], shape["dim"]
    q, k = (draw(batch, tokens, shape[n], dim).transpose(1, 2) for n in ("heads", "kv_heads"))
    angle = draw(1, tokens, shape.get("rotated", dim))
    arguments = (q, k, angle.cos(), angle.sin())
    return {"rotary_forward": arguments, "rotary_backward": arguments}


def vocabulary_passes(draw: Draw, shape: Shape) -> Passes:
    """A tile in the middle of the vocabulary; of some rows the id is in it."""
    groups, rows, columns, hidden = (shape[n] for n in ("groups", "rows", "columns", "hidden"))
    z, teacher_z, b_bar = (3 * draw(groups, rows, columns) for _ in range(3))
    lse, teacher_lse, center, weight = (draw(groups, rows).float() for _ in range(4))
    lse, teacher_lse = lse + 10, teacher_lse + 10
    ids = torch.arange(groups * rows, device=z.device).view(groups, rows) * 2
    first: int | Tensor = rows
    if shape.get("own"):
        first = torch.arange(columns, device=z.device).expand(groups, columns)
    top, total = draw(groups, 2 * rows).float(), draw(groups, 2 * rows).float().exp()
    student, teacher = (top[:, :rows], total[:, :rows], center), (top, total, center)
    b, e_w = draw(groups, rows, columns), draw(groups, rows, hidden)
    return {
        "online_softmax": (z, ids, rows, *student, z.dtype),
        "online_kl": (z, teacher_z, *teacher, z.dtype),
        "accumulate_": (draw(groups, rows, hidden).float(), e_w, lse.sigmoid()),
        "softmax_minus_one_hot": (z, lse, ids, first, z.dtype),
        "softmax_difference": (z, lse, teacher_z, teacher_lse, z.dtype),
        "logit_cotangent": (b_bar, center, weight, b, ids, first),
    }


def attention_passes(draw: Draw, shape: Shape) -> Passes:
    """q, k and v as a model has them: [B, T, H, D] in memory."""
    eager = importlib.import_module("gdprompt_fast.ops.eager.attention")
    batch, tokens, dim = shape["batch"], shape["tokens"], shape["dim"]

    def draw_heads(heads: int) -> Tensor:
        return draw(batch, tokens, heads, dim).transpose(1, 2)

    q, cot_dq, dout = (draw_heads(shape["heads"]) for _ in range(3))
    k, v, cot_dk, cot_dv = (draw_heads(shape["kv_heads"]) for _ in range(4))
    segment_BT = None
    if segments := shape.get("segments"):
        segment_BT = (torch.arange(tokens, device=q.device) * segments // tokens).expand(batch, -1)
    options = dim**-0.5, visible_keys(q, shape.get("window"), segment_BT)
    forward = (q, k, v, *options)
    backward = (dout.transpose(1, 2), q, k, v, *eager.attention_forward(*forward), *options)
    return {
        "attention_forward": forward,
        "attention_backward": backward,
        "attention_double_backward": (cot_dq, cot_dk, cot_dv, *backward),
    }


PASSES: dict[str, Callable[[Draw, Shape], Passes]] = {
    "linear": linear_passes,
    "lora": lora_passes,
    "norm": norm_passes,
    "swiglu": swiglu_passes,
    "gelu": gelu_passes,
    "rotary": rotary_passes,
    "vocabulary": vocabulary_passes,
    "attention": attention_passes,  # last: it takes the longest to compile
}
PASS_NAMES = {
    op: tuple(f"{op}_{pass_}" for pass_ in ("forward", "backward", "double_backward"))
    for op in PASSES
}
PASS_NAMES |= {
    "linear": ("updated_product",),
    "lora": ("lora_product", "lora_materialise"),
    "rotary": ("rotary_forward", "rotary_backward"),  # the double backward is the forward
    "vocabulary": (
        "online_softmax",
        "online_kl",
        "accumulate_",
        "softmax_minus_one_hot",
        "softmax_difference",
        "logit_cotangent",
    ),
}
ATTENTION_PRODUCTS = {"forward": 2, "backward": 5, "double_backward": 12}  # the fewest there can be


def flops(op: str, pass_: str, shape: Shape) -> float | None:
    """Of the matrix products of a pass; None where memory traffic is the ceiling."""
    if op == "linear":
        per_row = shape["outputs"] * (shape["inputs"] + shape["context"])
        return 2.0 * shape["groups"] * shape["rows"] * per_row
    if op == "attention":
        # a query sees itself and those before in its segment
        pairs = shape["tokens"] * (shape["tokens"] / shape.get("segments", 1) + 1) / 2
        product = 2.0 * shape["batch"] * shape["heads"] * pairs * shape["dim"]
        return product * ATTENTION_PRODUCTS[pass_.removeprefix("attention_")]
    return None


def tensors_in(values: Any) -> list[Tensor]:
    values = values if isinstance(values, tuple | list) else (values,)
    return [value for value in values if isinstance(value, Tensor)]


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# Measuring


def sample_ms(device: torch.device, call: Callable[[], object], repeats: int) -> list[float]:
    """Times of single calls on a GPU by events, each after the L2 has been emptied."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def measure(
    bench: Bench,
    call: Callable[[], object],
    present: list[Tensor],
    seconds: float,
    least: int,
    most: int,
) -> Row:
    """Memory, which warms up, then the time of as many calls as fit into ``seconds``; of a tiny run
    the time of the one call that memory takes.
    """
    if bench.tiny:
        start = time.perf_counter()
        memory = measure_memory(bench.device, call, present)
        return {**memory, **quantiles([1e3 * (time.perf_counter() - start)])}
    memory = measure_memory(bench.device, call, present)
    once = seconds_of(bench.device, call)
    repeats = max(least, min(most, int(seconds / max(once, 1e-6))))
    return {**memory, **quantiles(sample_ms(bench.device, call, repeats))}


# Cases


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
    measured = measure(bench, call, present, seconds=1.0, least=10, most=100)
    rate = work / (1e-3 * measured["median_ms"])
    return {**measured, "rate": rate, "ceiling_ratio": 1.0, "status": bench.timed_status}


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def gate(bench: Bench, op: str, pass_: str, shape: Shape, dtype: torch.dtype) -> Row:
    """The worst output of a pass: its error, that of the plain pass, and what is allowed."""
    plain_pass = getattr(importlib.import_module(f"gdprompt_fast.ops.eager.{op}"), pass_)
    kernel_pass = getattr(importlib.import_module(f"gdprompt_fast.kernels.{op}"), pass_)

    def arguments() -> tuple[Any, ...]:
        """Drawn again each time: some passes work in place."""
        return PASSES[op](drawer(bench.device, dtype), shape)[pass_]

    exact = plain_pass(*map(widened, arguments()))
    return compare(kernel_pass(*arguments()), plain_pass(*arguments()), exact)


def compare(kernel: Any, eager: Any, gold: Any) -> Row:
    """The row of a gate, of results in the same order."""
    worst: Row = {}
    for got, plain, exact in zip(*map(tensors_in, (kernel, eager, gold)), strict=True):
        if (got.shape, got.dtype, got.device) != (plain.shape, plain.dtype, plain.device):
            return {"status": f"failed: {got.dtype} {list(got.shape)}, not as the plain pass"}
        error, eager_error = relative_error(got, exact), relative_error(plain, exact)
        allowed = 2 * eager_error + FLOOR.get(got.dtype, 1e-6)
        # A NaN is not below anything: it counts as infinite.
        excess = error / allowed if math.isfinite(error) else math.inf
        if not worst or excess > worst["excess"]:
            worst = dict(error=error, eager_error=eager_error, allowed_error=allowed, excess=excess)
    passed = worst.pop("excess") <= 1
    return {**worst, "status": "passed" if passed else "failed: error above the allowed"}


def time_pass(bench: Bench, op: str, pass_: str, shape: Shape, provider: str) -> Row:
    failed = bench.failed_gates(op, pass_)
    if provider == "triton" and failed:
        return {"status": f"not timed: gate on {failed[0]['case']} {failed[0]['dtype']} not passed"}
    package = "gdprompt_fast.kernels" if provider == "triton" else "gdprompt_fast.ops.eager"
    function = getattr(importlib.import_module(f"{package}.{op}"), pass_)
    arguments = PASSES[op](drawer(bench.device, torch.bfloat16), shape)[pass_]
    inputs = tensors_in(arguments)
    work = flops(op, pass_, shape)
    if work is None:
        work = bytes_of(inputs) + bytes_of(tensors_in(function(*arguments)))

    def call() -> object:
        return function(*arguments)

    measured = measure(bench, call, inputs, seconds=0.5, least=5, most=100)
    return against_ceiling(bench, measured, work, ceiling_of(op))


def against_ceiling(bench: Bench, measured: Row, work: float, name: str) -> Row:
    rate, ceiling = work / (1e-3 * measured["median_ms"]), bench.ceiling(name)
    ratio = rate / ceiling if ceiling else None
    return {**measured, "rate": rate, "ceiling_ratio": ratio, "status": bench.timed_status}


def ceiling_of(op: str) -> str:
    return "matrix" if op in ("linear", "attention") else "copy"


def kernel_cases(bench: Bench) -> Iterator[Case]:
    """The gates of an op, then its times."""
    for op in PASSES:
        if op not in backend.KERNELS:
            continue
        timed = bench.shapes(TIMED, op)
        for name, shape in {**bench.shapes(ODD, op), **timed}.items():
            for dtype in FLOOR:
                for pass_ in PASS_NAMES[op]:
                    run = functools.partial(gate, bench, op, pass_, shape, dtype)
                    yield case(
                        "kernel",
                        "gate",
                        op,
                        run,
                        **{"pass": pass_, "provider": "triton", "case": name, "shapes": shape},
                        dtype=str(dtype).removeprefix("torch."),
                    )
        for name, shape in timed.items():
            for pass_ in PASS_NAMES[op]:
                for provider in ("triton", "eager"):
                    run = functools.partial(time_pass, bench, op, pass_, shape, provider)
                    yield case(
                        "kernel",
                        "time",
                        op,
                        run,
                        **{"pass": pass_, "provider": provider, "case": name, "shapes": shape},
                        dtype="bfloat16",
                        ceiling=ceiling_of(op),
                    )


# Matrix products with kernels between them


def inner_linear_calls(draw: Draw, shape: Shape) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """A use of θ' with its match x Xᵀ, and the cotangents of X and E from a use."""
    groups, rows, inputs, outputs, context = (shape[name] for name in UP)
    bias = draw(outputs) if shape.get("bias") else None
    layer = InnerLinear(
        draw(outputs, inputs),
        bias,
        inner_weight=True,
        inner_bias=bias is not None,
        rate=Rate(torch.full_like(draw(groups), 0.3, dtype=torch.float32)),
        phase=Phase(second_order=True),
        weight_gradient=None,
        bias_gradient=None,
    )
    factor = Factor(draw(groups, context, inputs), draw(groups, context, outputs))
    layer.factors.append(factor)
    x, u, f = draw(groups, rows, inputs), draw(groups, rows, inputs), draw(groups, rows, outputs)
    grouped = GroupedRows(torch.arange(groups, device=x.device), groups)

    def product() -> tuple[Tensor, ...]:
        return (layer.product(x, grouped, 1),)

    def pull() -> tuple[Tensor, ...]:
        factor.uses.append(Use(u, f, True, None, None))
        x_cot, e_cot = layer.factor_cotangents(factor)
        assert x_cot is not None and e_cot is not None
        return x_cot, e_cot

    return {"inner_linear_product": product, "inner_linear_pull": pull}


def inner_linear_flops(pass_: str, shape: Shape) -> float:
    """As timed, through the tokens: x W, x Xᵀ and its product with E; twice two products."""
    groups, rows, inputs, outputs, context = (shape[name] for name in UP)
    update = context * (inputs + outputs)
    per_row = {
        "inner_linear_product": inputs * outputs + update,
        "inner_linear_pull": 2 * update,
    }[pass_]
    return 2.0 * groups * rows * per_row


def loss_calls(draw: Draw, shape: Shape) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """At a tied head after an inner step: forward and inner backward of the contexts' loss, forward
    and backward of the responses' KL to a teacher, and the double backward of the former with the
    head's gradient of both.
    """
    groups, rows, responses, hidden = (shape[n] for n in ("groups", "rows", "responses", "hidden"))
    weight = draw(shape["vocabulary"], hidden) * hidden**-0.5
    weight.grad = torch.zeros_like(weight)
    phase, gradient = Phase(second_order=True), WeightGradient(weight)
    vocabulary = Vocabulary(weight, None, True, 0.1, phase, gradient)
    group = torch.arange(groups, device=weight.device)
    ids = torch.arange(groups * rows, device=weight.device) ** 2 % len(weight)
    vocabulary.begin_contexts(ids.view(groups, rows), GroupedRows(group, groups))
    h_GSD, e_GSD, direction_GSD = (draw(groups, rows, hidden) for _ in range(3))
    h_GMD, teacher_GMD, u_GMD = (draw(groups, responses, hidden) for _ in range(3))
    wide = torch.promote_types(weight.dtype, torch.float32)
    position_weight = torch.full((groups, rows), 1 / rows, device=weight.device, dtype=wide)

    def context_loss() -> tuple[Tensor, ...]:
        vocabulary.steps.clear()
        nll_GS = context_pass(vocabulary, h_GSD, 0)
        (step,) = vocabulary.steps
        step.weight_GS, step.lookup_GSD, step.direction_GSD = position_weight, e_GSD, direction_GSD
        return nll_GS, state_gradient(vocabulary, step, 0)

    def response_loss() -> tuple[Tensor, ...]:
        target = TeacherTarget(None, teacher_GMD, weight)
        response = response_pass(vocabulary, h_GMD, target, 1)
        vocabulary.response, vocabulary.uses = response.f.tile, [response.use]
        return response.loss_GM, response.dh_GMD

    def double_backward() -> tuple[Tensor, ...]:
        return adjoint_pass(vocabulary, 0), weight.grad

    context_loss()
    response_loss()
    vocabulary.lookups.append(Lookup(ids.view(groups, rows)[:, :responses], u_GMD))
    return {
        "context_loss": context_loss,
        "response_loss": response_loss,
        "double_backward": double_backward,
    }


def loss_flops(pass_: str, shape: Shape) -> float:
    """Of the products with the head, and with the inner update of the responses' logits."""
    groups, rows, responses = shape["groups"], shape["rows"], shape["responses"]
    per_context, per_response, per_pair = {
        "context_loss": (2, 0, 0),  # logits, mean row
        "response_loss": (1, 4, 3),  # of student and teacher
        "double_backward": (5, 3, 2),  # logits twice, their cotangent's product, gradients
    }[pass_]
    tokens = groups * (rows * per_context + responses * per_response) * shape["hidden"]
    return 2.0 * shape["vocabulary"] * (tokens + groups * rows * responses * per_pair)


@dataclass(frozen=True)
class Composite:
    """An op of matrix products and kernels: its calls, their FLOPs, the op its kernels are of."""

    calls: Callable[[Draw, Shape], dict[str, Callable[[], tuple[Tensor, ...]]]]
    names: tuple[str, ...]
    flops: Callable[[str, Shape], float]
    kernels: str


COMPOSITES = {
    "inner_linear": Composite(
        inner_linear_calls,
        ("inner_linear_product", "inner_linear_pull"),
        inner_linear_flops,
        "linear",
    ),
    "losses": Composite(
        loss_calls,
        ("context_loss", "response_loss", "double_backward"),
        loss_flops,
        "vocabulary",
    ),
}


def gate_composite(bench: Bench, op: str, pass_: str, shape: Shape, dtype: torch.dtype) -> Row:
    results = []
    for on, wide in (("triton", False), ("torch", False), ("torch", True)):
        draw = drawer(bench.device, dtype)
        with backend.use_backend(on):
            made = (lambda *s, d=draw: d(*s).double()) if wide else draw
            results.append(COMPOSITES[op].calls(made, shape)[pass_]())
    return compare(*results)


def time_composite(bench: Bench, op: str, pass_: str, shape: Shape, provider: str) -> Row:
    kernels = COMPOSITES[op].kernels
    gates = [(op, pass_), *((kernels, name) for name in PASS_NAMES[kernels])]
    if provider == "triton" and any(bench.failed_gates(*each) for each in gates):
        return {"status": "not timed: gate not passed"}
    with backend.use_backend("triton" if provider == "triton" else "torch"):
        call = COMPOSITES[op].calls(drawer(bench.device, torch.bfloat16), shape)[pass_]
        measured = measure(bench, call, [], seconds=0.5, least=3, most=30)
    return against_ceiling(bench, measured, COMPOSITES[op].flops(pass_, shape), "matrix")


def composite_cases(bench: Bench) -> Iterator[Case]:
    """The gates of an op, then its times."""
    for op, composite in COMPOSITES.items():
        for name, shape in bench.shapes(ODD, op).items():
            for dtype, pass_ in itertools.product(FLOOR, composite.names):
                run = functools.partial(gate_composite, bench, op, pass_, shape, dtype)
                row = {"pass": pass_, "provider": "triton", "case": name, "shapes": shape}
                yield case("kernel", "gate", op, run, **row, dtype=str(dtype)[6:])
        for name, shape in bench.shapes(TIMED, op).items():
            for pass_, provider in itertools.product(composite.names, ("triton", "eager")):
                run = functools.partial(time_composite, bench, op, pass_, shape, provider)
                row = {"pass": pass_, "provider": provider, "case": name, "shapes": shape}
                yield case("kernel", "time", op, run, **row, dtype="bfloat16", ceiling="matrix")


# The whole step

FIRST_ORDER = dict(first_order=True)
KL_RECOMPUTE = dict(objective="kl", recompute="block")
# The options of fast_meta_step, and whether it runs under autocast to bf16.
STEP_GATES: dict[str, tuple[dict[str, Any], bool]] = {
    "second_order": ({}, False),
    "first_order": (FIRST_ORDER, False),
    "kl_recompute": (KL_RECOMPUTE, False),
    "kl_autocast": (dict(objective="kl"), True),
}


@dataclass(frozen=True)
class Step:
    """A step to time: None for the options of an ordinary one; the gate that it needs."""

    options: dict[str, Any] | None = None
    gate: str = "second_order"
    autocast: bool = False  # of fp32 weights to bf16

    @property
    def dtype(self) -> str:
        return "bfloat16 autocast" if self.autocast else "bfloat16"


STEPS = {
    "ordinary step": Step(),
    **{
        f"{name}, {on}": Step(dict(backend=on, **options), gate)
        for name, options, gate in (
            ("fast_meta_step", {}, "second_order"),
            ("first-order MAML", FIRST_ORDER, "first_order"),
            ("fast_meta_step, KL", dict(objective="kl"), "kl_recompute"),
            ("fast_meta_step, KL, recompute", KL_RECOMPUTE, "kl_recompute"),
        )
        for on in ("torch", "triton")
    },
    "ordinary step, autocast": Step(autocast=True),
    **{
        f"fast_meta_step, KL, autocast, {on}": Step(
            dict(backend=on, objective="kl"), "kl_autocast", True
        )
        for on in ("torch", "triton")
    },
}


TINY_STEP = cases.Case(cases.llama(16, 1, 1, 1, 24, 32), 2, 4, 5)


def gate_shape(tiny: bool) -> cases.Case:
    return TINY_STEP if tiny else cases.CASES["tiny"]


def step_shape(tiny: bool) -> cases.Case:
    if tiny:
        return TINY_STEP
    return replace(cases.CASES["llama-1b"], examples=16, context_tokens=256, query_tokens=32)


def gate_step(bench: Bench, name: str) -> Row:
    """The gradients of a tiny fp32 model on both backends against the reference in fp64."""
    options, autocast = STEP_GATES[name]
    shape = gate_shape(bench.tiny)
    model = random_model(shape, bench.device, torch.float32)
    batch = random_batch(shape, bench.device)
    options = {"objective": "gold", "inner_lr": 0.05, **options}
    if options["objective"] == "kl":
        draw, size = drawer(bench.device, torch.float32), shape.config.hidden_size
        tokens = int(batch.response_mask.sum())
        head = draw(shape.config.vocab_size, size) * size**-0.5
        options["teacher"] = TeacherTargets(hidden=draw(tokens, size), head=head)
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=autocast):
        out, on_triton = gradients_of(fast_meta_step, model, batch, backend="triton", **options)
        assert out.backend == "triton"
        _, on_torch = gradients_of(fast_meta_step, model, batch, backend="torch", **options)
    model.double()
    with without_upcasts(model):
        _, exact = gradients_of(reference_meta_step, model, batch, **options)
    error, parameter = worst_error(on_triton, exact)
    plain, _ = worst_error(on_torch, exact)
    allowed = 2 * plain + 1e-3 if autocast else min(2 * plain, 1e-4) + 1e-6
    status = "passed" if error <= allowed else f"failed: error above the allowed in {parameter}"
    return dict(error=error, eager_error=plain, allowed_error=allowed, status=status)


@functools.lru_cache(maxsize=1)
def step_model(tiny: bool, device: torch.device, dtype: torch.dtype) -> Any:
    return random_model(step_shape(tiny), device, dtype)


def time_step(bench: Bench, provider: str) -> Row:
    step = STEPS[provider]
    options = step.options
    if options and options["backend"] == "triton" and bench.failed_gates("step", step.gate):
        return {"status": "not timed: gate not passed"}
    model = step_model(bench.tiny, bench.device, torch.float32 if step.autocast else torch.bfloat16)
    batch = random_batch(step_shape(bench.tiny), bench.device)
    ids = torch.cat([batch.context_ids, batch.query_ids], 1)
    present = model_tensors(model)
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=step.autocast):
        if options:
            options = {"objective": "gold", **options}
            if options["objective"] == "kl":
                options["teacher"] = self_teacher(model, batch)
                present.append(options["teacher"].hidden)

        def call() -> object:
            if options:
                return fast_meta_step(model, batch, **options)
            return model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        measured = measure(bench, call, present, seconds=4.0, least=3, most=10)
    return {**measured, "status": bench.timed_status}


def step_cases(bench: Bench) -> Iterator[Case]:
    for name, (_, autocast) in STEP_GATES.items():
        run = functools.partial(gate_step, bench, name)
        row = {"pass": name, "provider": "triton", "case": "tiny"}
        row["dtype"] = "bfloat16 autocast" if autocast else "float32"
        yield case("step", "gate", "step", run, **row, shapes=gate_shape(bench.tiny).shapes())
    shape = step_shape(bench.tiny)
    name = "tiny" if bench.tiny else "Llama 3.2 1B"
    for provider, step in STEPS.items():
        run = functools.partial(time_step, bench, provider)
        row = {"pass": "step", "provider": provider, "case": name, "dtype": step.dtype}
        yield case("step", "time", "step", run, **row, shapes=shape.shapes())


def all_cases(bench: Bench) -> list[Case]:
    ceilings = {"copy": (copy_ceiling, "uint8"), "matrix": (matrix_ceiling, "bfloat16")}
    cases = [
        case(
            "ceiling",
            "ceiling",
            name,
            functools.partial(run, bench),
            **{"pass": "forward", "provider": "torch", "case": name, "dtype": dtype},
            shapes={},
            ceiling=name,
        )
        for name, (run, dtype) in ceilings.items()
    ]
    return [*cases, *kernel_cases(bench), *composite_cases(bench), *step_cases(bench)]


# The worker


def run_case(case: Case, elapsed: float) -> Row:
    """What the case returns, or why it does not.

    Raises:
        RuntimeError: if nothing runs on the GPU any more in this process.
    """
    if elapsed > SECTION_END_S[case.row["section"]]:
        return {"status": "out of time"}
    try:
        return case.run()
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return {"status": f"error: {type(error).__name__}: {error}"[:600]}


def work(arguments: argparse.Namespace) -> None:
    """Runs the cases from ``--first`` on, each announced on stdout before."""
    device = torch.device("cpu" if arguments.tiny else "cuda")
    torch.set_float32_matmul_precision("highest")
    if arguments.tiny:
        torch.set_num_threads(1)
        sys.path.append(str(ROOT / "tests"))
        importlib.import_module("triton_interpreter").mend()
    elif os.environ["TRITON_INTERPRET"] == "1" or not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device and no TRITON_INTERPRET=1; or give --tiny")
    else:
        torch.cuda.init()
    bench = Bench(device, arguments.tiny, rows_of(arguments.results, arguments.run))
    common = dict(
        run=arguments.run,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU, interpreter",
        torch=torch.__version__,
        triton=importlib.metadata.version("triton"),
        revision=arguments.revision,
        dirty=arguments.revision.endswith("-dirty"),
    )
    cases = all_cases(bench)
    gc.freeze()  # a collection after every case need not look at the libraries again
    progress = tqdm(total=len(cases), initial=arguments.first, unit="case", file=sys.stderr)
    for index, each in enumerate(cases[arguments.first :], arguments.first):
        row = {**common, **each.row}
        progress.set_description(" ".join(str(row[n]) for n in ("op", "pass", "provider", "case")))
        print(json.dumps({"index": index, "row": row}), flush=True)
        row |= run_case(each, time.time() - arguments.begun)
        release(device)
        append(arguments.results, row)
        bench.rows.append(row)
        progress.update()
    progress.close()


# The process that waits


def watch(command: list[str], begun: float) -> tuple[int, Row | None, bool]:
    """Runs a worker; its exit status, its last announcement, and whether it had to be killed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last: Row | None = None
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        process.kill()

    def limit() -> threading.Timer:
        left = max(25.0, begun + TOTAL_S - time.time())
        timer = threading.Timer(min(CASE_LIMIT_S, left), kill)
        timer.daemon = True
        timer.start()
        return timer

    timer = limit()
    for line in process.stdout:
        if not line.startswith('{"index"'):
            sys.stderr.write(line)
            continue
        timer.cancel()
        last, timer = json.loads(line), limit()
    status = process.wait()
    timer.cancel()
    return status, last, killed.is_set()


def supervise(worker: list[str], results: Path, begun: float) -> None:
    """Starts workers until one comes to the end; what ended the others becomes a row."""
    first = 0
    while True:
        status, last, killed = watch([*worker, "--first", str(first)], begun)
        if status == 0:
            return
        if last is None:
            raise SystemExit(f"the worker ended with status {status} before its first case")
        why = "killed: it took too long" if killed else f"crashed: exit status {status}"
        append(results, {**last["row"], "status": why})
        first = last["index"] + 1


def table(rows: list[Row]) -> str:
    """The rows in Markdown: kernels beside the plain passes, steps beside the ordinary one."""
    lines = ["| pass | case | Triton ms | speed-up | of ceiling | eager's | own MB | eager's |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    timed = [row for row in rows if row["kind"] == "time"]
    pairs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in timed:
        if row["op"] != "step":
            pairs.setdefault((row["pass"], row["case"]), {})[row["provider"]] = row
    for (pass_, name), pair in pairs.items():
        ours, eager = pair.get("triton", EMPTY), pair.get("eager", EMPTY)
        cells = [pass_, name, number(ours["median_ms"], "{:.3f}") or ours["status"]]
        cells.append(ratio(eager["median_ms"], ours["median_ms"]))
        cells += [number(row["ceiling_ratio"], "{:.0%}") for row in (ours, eager)]
        for row in (ours, eager):
            cells.append(number(own_bytes(row), "{:,.0f}", 1e-6))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    steps = [row for row in timed if row["op"] == "step"]
    ordinary = {row["dtype"]: row for row in steps if STEPS[row["provider"]].options is None}
    lines += ["", "| step | ms | × ordinary | peak GB | × ordinary |", "|---|---|---|---|---|"]
    for row in steps:
        base = ordinary.get(row["dtype"], EMPTY)
        cells = [row["provider"], number(row["median_ms"], "{:.0f}") or row["status"]]
        cells.append(ratio(row["median_ms"], base["median_ms"]))
        cells.append(number(row["peak_bytes"], "{:.2f}", 1e-9))
        cells.append(ratio(row["peak_bytes"], base["peak_bytes"]))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def number(value: float | None, style: str, scale: float = 1.0) -> str:
    return "" if value is None else style.format(value * scale)


def ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value is not None and base else ""


def summary(rows: list[Row]) -> str:
    """The ceilings, what attention should keep to, the gates, and every row that is not as it
    should be.
    """
    units = {"copy": "GB/s", "matrix": "GFLOP/s"}
    lines = []
    for row in rows:
        if row["kind"] == "ceiling" and row["rate"]:
            lines.append(f"ceiling, {row['op']}: {row['rate'] / 1e9:,.0f} {units[row['op']]}")
    lines += attention_ratios(rows)
    gates = [row["status"] == "passed" for row in rows if row["kind"] == "gate"]
    lines.append(f"gates: {sum(gates)} of {len(gates)} passed")
    for row in rows:
        if row["status"] not in GOOD:
            what = (row["pass"], row["case"], row["dtype"], row["provider"], row["kind"])
            lines.append(f"- {', '.join(map(str, what))}: {row['status']}")
    return "\n".join(lines)


def attention_ratios(rows: list[Row]) -> list[str]:
    """Of every case the time of the double backward to that of the backward; of every pass the
    growth of its own memory from 4096 to 8192 tokens, 2 where it is linear in them.
    """
    timed = [row for row in rows if (row["op"], row["kind"]) == ("attention", "time")]
    ours = {(row["pass"], row["case"]): row for row in timed if row["provider"] == "triton"}
    lines = []
    for (pass_, name), row in ours.items():
        if pass_ == "attention_double_backward":
            backward = ours.get(("attention_backward", name), EMPTY)
            times = ratio(row["median_ms"], backward["median_ms"])
            lines.append(f"double backward of attention, {name}: {times} x its backward")
    for pass_ in PASS_NAMES["attention"]:
        few, many = (
            own_bytes(ours.get((pass_, f"one text of {tokens} tokens"), EMPTY))
            for tokens in (4096, 8192)
        )
        if few and many:
            lines.append(f"{pass_}, 8192 to 4096 tokens: {ratio(many, few)} x the bytes")
    return lines


def own_bytes(row: Row) -> int | None:
    return None if row["peak_bytes"] is None else row["peak_bytes"] - row["held_bytes"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in Triton's interpreter")
    parser.add_argument("--results", type=Path, default=RESULTS, help="appended to, a row a line")
    parser.add_argument("--revision", default=None, help="git's, where there is no git")
    parser.add_argument("--run", default=None, help=argparse.SUPPRESS)  # these make it a worker
    parser.add_argument("--begun", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        work(arguments)
        return 0
    run = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{os.getpid()}"
    worker = [sys.executable, str(Path(__file__).resolve()), "--run", run]
    worker += ["--results", str(arguments.results), "--begun", str(arguments.begun)]
    worker += ["--revision", arguments.revision or revision()]
    supervise(worker + ["--tiny"] * arguments.tiny, arguments.results, arguments.begun)
    rows = rows_of(arguments.results, run)
    print(f"{table(rows)}\n\n{summary(rows)}")
    # Out of memory is a result; anything else that is not good is for a person to look at.
    return int(any(row["status"] not in (*GOOD, "out of memory") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
