"""The ops in C++ against PyTorch on a CPU: every pass on the shapes of the demo and of the 63 M
Llama of the other benchmarks, then the whole step.

    python -m benchmarks.ops.cpp

Before a pass is timed, its error against fp64 must be at most twice PyTorch's in the same dtype.
Appends a row for each pass to benchmarks/results/cpp.jsonl. An op is worth its C++ if it is 1.3
times as fast as PyTorch on one of these shapes.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from gdprompt_fast import fast_meta_step
from gdprompt_fast.models.memory import model_tensors
from gdprompt_fast.ops import backend
from gdprompt_fast.ops.vocabulary.block import TILE_ELEMENTS
from gdprompt_fast.reference.compare import gradients_of, worst_error
from gdprompt_fast.testing.gates import copied, judge, widened
from gdprompt_fast.testing.op_inputs import PASSES, Shape, drawer

from ..harness.rows import RESULTS, append, revision
from ..harness.timing import measure_memory
from ..step.cases import CASES, Case, llama, random_batch, random_model, self_teacher

ROWS = RESULTS / "cpp.jsonl"
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = {
    "demo": Case(llama(128, 4, 4, 4, 384, 160), 16, 44, 12),
    "llama-63m": CASES["llama-63m"],
}


def inputs_of(op: str, case: Case, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """The inputs of every pass of an op on the contexts of a case."""
    config, B, T = case.config, case.examples, case.context_tokens
    shapes: dict[str, Shape] = {
        "norm": dict(examples=B, tokens=T, hidden=config.hidden_size),
        "swiglu": dict(examples=B, tokens=T, hidden=config.intermediate_size),
        "gelu": dict(examples=B, tokens=T, hidden=4 * config.hidden_size, tanh=1),
        "vocabulary": dict(
            groups=B,
            rows=T,
            columns=min(config.vocab_size, TILE_ELEMENTS // (B * T)),
            hidden=config.hidden_size,
        ),
    }
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    heads = dict(heads=config.num_attention_heads, kv_heads=kv_heads)
    attention: Shape = dict(
        batch=B, tokens=T, dim=config.hidden_size // config.num_attention_heads, **heads
    )
    return PASSES[op](drawer(torch.device("cpu"), dtype), shapes.get(op, attention))


def check(name: str, cpp: Any, eager: Any, inputs: tuple[Any, ...]) -> float:
    """The gate: no speed is reported for a wrong result. Returns the largest error."""
    fast, plain = (getattr(module, name)(*copied(inputs)) for module in (cpp, eager))
    verdict = judge(fast, plain, getattr(eager, name)(*map(widened, copied(inputs))))
    if verdict.status != "passed" or verdict.error is None:
        raise SystemExit(f"{name} is wrong: {verdict}")
    return verdict.error


def least_ms(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Milliseconds of each, which take turns: the least, as whatever else runs only adds to it."""
    seconds = [math.inf] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    return [1e3 * s for s in seconds]


def rows_of_ops(rounds: int) -> Iterator[dict[str, object]]:
    for case_name, case in SHAPES.items():
        for op in sorted(backend.CPP):
            cpp, eager = (import_module(f"gdprompt_fast.ops.{b}.{op}") for b in ("cpp", "eager"))
            for dtype in DTYPES:
                for name, inputs in inputs_of(op, case, dtype).items():
                    error = check(name, cpp, eager, inputs)
                    runs = [partial(getattr(module, name), *inputs) for module in (cpp, eager)]
                    cpp_ms, torch_ms = least_ms(runs, rounds)
                    yield dict(
                        case=case_name,
                        op=op,
                        name=name,
                        dtype=str(dtype).removeprefix("torch."),
                        gate_error=error,
                        min_ms=cpp_ms,
                        torch_min_ms=torch_ms,
                        ratio=torch_ms / cpp_ms,
                    )


def rows_of_steps(rounds: int) -> Iterator[dict[str, object]]:
    cpu = torch.device("cpu")
    for case_name, case in SHAPES.items():
        model, batch = random_model(case, cpu, torch.float32), random_batch(case, cpu)
        options: dict[str, Any] = dict(batch=batch, teacher=self_teacher(model, batch))
        _, on_torch = gradients_of(fast_meta_step, model, backend="torch", **options)
        _, on_cpp = gradients_of(fast_meta_step, model, backend="cpp", **options)
        error, name = worst_error(on_cpp, on_torch)
        if not error < 1e-4:
            raise SystemExit(f"the step is wrong: {name} has a relative error of {error:.1e}")
        runs = [partial(fast_meta_step, model, backend=b, **options) for b in ("cpp", "torch")]
        cpp_ms, torch_ms = least_ms(runs, rounds)
        memory = [measure_memory(cpu, run, model_tensors(model)) for run in runs]
        cpp_bytes, torch_bytes = (m["peak_bytes"] - m["held_bytes"] for m in memory)
        yield dict(
            case=case_name,
            op="step",
            name="fast_meta_step",
            dtype="float32",
            gate_error=error,
            min_ms=cpp_ms,
            torch_min_ms=torch_ms,
            ratio=torch_ms / cpp_ms,
            peak_bytes=cpp_bytes,
            torch_peak_bytes=torch_bytes,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50, help="of every pass")
    parser.add_argument("--step-rounds", type=int, default=10, help="of the whole step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=ROWS)
    arguments = parser.parse_args()
    if not backend.load_cpp():
        raise SystemExit(f"the C++ ops are not built: {backend.BUILD_CPP}")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    common = dict(
        device=f"CPU {platform.machine()}, {arguments.threads} threads",
        torch=torch.__version__,
        revision=revision(),
    )
    print("| case | pass | dtype | C++ | PyTorch | ratio |")
    print("|---|---|---|---|---|---|")
    for row in chain(rows_of_ops(arguments.rounds), rows_of_steps(arguments.step_rounds)):
        append(arguments.results, {**row, **common})
        print(
            f"| {row['case']} | {row['name']} | {row['dtype']} | {row['min_ms']:.3f} ms "
            f"| {row['torch_min_ms']:.3f} ms | {row['ratio']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
