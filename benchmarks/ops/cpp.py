"""The ops in C++ against PyTorch on a CPU: every pass on the shapes of the demo and of the 63 M
Llama of the other benchmarks, then the whole step.

    python benchmarks/cpp.py

Before a pass is timed, its error against fp64 must be at most twice PyTorch's in the same dtype.
Appends a row for each pass to benchmarks/results/cpp.jsonl. An op is worth its C++ if it is 1.3
times as fast as PyTorch on one of these shapes.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case, llama, random_batch, random_model, self_teacher
from measuring import append, measure_memory, revision
from torch import Tensor

from gdprompt_fast import fast_meta_step
from gdprompt_fast.models.memory import model_tensors
from gdprompt_fast.ops import backend
from gdprompt_fast.ops.vocabulary.block import TILE_ELEMENTS
from gdprompt_fast.reference.compare import gradients_of, worst_error

RESULTS = Path(__file__).parent / "results" / "cpp.jsonl"
SHAPES = {
    "demo": Case(llama(128, 4, 4, 4, 384, 160), 16, 44, 12),
    "llama-63m": CASES["llama-63m"],
}
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3}


def inputs_of(op: str, case: Case, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """The inputs of every pass of an op on the contexts of a case."""
    config, B, T = case.config, case.examples, case.context_tokens
    eager = import_module(f"gdprompt_fast.ops.eager.{op}")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    def heads(count: int) -> Tensor:
        return draw(B, T, count, config.head_dim).transpose(1, 2)

    if op == "norm":
        x, dy, u = (draw(B, T, config.hidden_size) for _ in range(3))
        weight, v, w = (draw(B, config.hidden_size) for _ in range(3))
        forward = x, weight, None, 1e-6, False
        backward = dy, x, weight, *eager.norm_forward(*forward)[1:]
        return dict(
            norm_forward=forward, norm_backward=backward, norm_double_backward=(u, v, w, *backward)
        )
    if op == "swiglu":
        gate, up, dy, a, b = (draw(B, T, config.intermediate_size) for _ in range(5))
        return dict(
            swiglu_forward=(gate, up),
            swiglu_backward=(dy, gate, up),
            swiglu_double_backward=(a, b, dy, gate, up),
        )
    if op == "gelu":
        x, dy, a = (draw(B, T, 4 * config.hidden_size) for _ in range(3))
        return dict(
            gelu_forward=(x, "tanh"),
            gelu_backward=(dy, x, "tanh"),
            gelu_double_backward=(a, dy, x, "tanh"),
        )
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if op == "rotary":
        tables = draw(1, T, D), draw(1, T, D)
        inputs = heads(H), heads(K), *tables
        return dict(rotary_forward=inputs, rotary_backward=inputs)
    if op == "attention":
        qkv, dots = [(heads(H), heads(K), heads(K)) for _ in range(2)]
        options = D**-0.5, None
        saved = draw(B, T, H, D), *qkv, *eager.attention_forward(*qkv, *options), *options
        return dict(
            attention_forward=(*qkv, *options),
            attention_backward=saved,
            attention_double_backward=(*dots, *saved),
        )
    assert op == "vocabulary"
    columns = min(config.vocab_size, TILE_ELEMENTS // (B * T))
    z, teacher_z, b_bar = (draw(B, T, columns) for _ in range(3))
    ids = torch.randint(config.vocab_size, (B, T))
    top, total, value = (torch.rand(B, T) for _ in range(3))
    top_R, total_R = torch.cat([top, top], 1), torch.cat([total, total], 1)
    lse, share = torch.logsumexp(z.float(), -1), draw(B, T, config.hidden_size)
    b = eager.softmax_minus_one_hot(z, lse, ids, 0, dtype)
    return dict(
        online_softmax=(z, ids, 0, top, total, value, dtype),
        online_kl=(z, teacher_z, top_R, total_R, value, dtype),
        accumulate_=(share.float(), share, top),
        softmax_minus_one_hot=(z, lse, ids, 0, dtype),
        softmax_difference=(z, lse, teacher_z, lse, dtype),
        logit_cotangent=(b_bar, value, total, b, ids, 0),
    )


def in_fp64(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A pass may write to its inputs."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


def check(name: str, cpp: Any, eager: Any, inputs: tuple[Any, ...]) -> float:
    """The gate: no speed is reported for a wrong result. Returns the largest error."""
    fast, plain = (getattr(module, name)(*copied(inputs)) for module in (cpp, eager))
    gold = getattr(eager, name)(*map(in_fp64, copied(inputs)))
    results = [(r,) if isinstance(r, Tensor) else r for r in (fast, plain, gold)]
    worst = 0.0
    for f, p, g in zip(*results, strict=True):
        if g is None or not g.norm():
            continue
        ours, theirs = (float((t.double() - g).norm() / g.norm()) for t in (f, p))
        if not ours <= 2 * theirs + FLOOR[p.dtype]:
            raise SystemExit(f"{name} is wrong: error {ours:.1e}, of PyTorch {theirs:.1e}")
        worst = max(worst, ours)
    return worst


def least_ms(runs: list[Callable[[], object]], rounds: int) -> list[float]:
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
            for dtype in FLOOR:
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
    parser.add_argument("--results", type=Path, default=RESULTS)
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
