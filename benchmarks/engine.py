"""Time and memory of a meta step against an ordinary training step and the sequential exact loop,
in one run.

    python benchmarks/engine.py                      # Llama of 63 M parameters, all providers
    python benchmarks/engine.py --case llama-1b      # the shape of Llama 3.2 1B: fast_meta_step
    only, needs 16 GB

The gate runs first: fast_meta_step has the gradient of the reference. Rounds take turns between the
providers, so that a change of the machine's speed meets all of them. Rows are appended to
benchmarks/results/engine.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from gdprompt_fast import MetaBatch, TeacherTargets, fast_meta_step, reference_meta_step
from gdprompt_fast.memory import peak_bytes_over_model
from gdprompt_fast.reference.compare import gradients_of, worst_error

RESULTS = Path(__file__).parent / "results" / "engine.jsonl"


@dataclass(frozen=True)
class Case:
    config: LlamaConfig
    examples: int
    context_tokens: int
    query_tokens: int
    providers: tuple[str, ...]


def llama(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )


ALL = ("ordinary step", "fast_meta_step", "first-order MAML", "sequential exact loop")
CASES = {
    "tiny": Case(llama(64, 2, 4, 2, 128, 256), 4, 16, 8, ALL),
    "llama-63m": Case(llama(768, 8, 12, 4, 2048, 16384), 8, 64, 16, ALL),
    "llama-1b": Case(llama(2048, 16, 32, 8, 8192, 128256), 16, 16, 8, ("fast_meta_step",)),
}
RESPONSE_TOKENS = 4


def providers(
    model: LlamaForCausalLM, case: Case
) -> tuple[MetaBatch, TeacherTargets, dict[str, Callable[[], object]]]:
    """The same tokens for all: the ordinary step trains on every context and its query as one
    text.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = case.config.vocab_size
    context_ids = torch.randint(
        vocabulary, (case.examples, case.context_tokens), generator=generator
    )
    query_ids = torch.randint(vocabulary, (case.examples, case.query_tokens), generator=generator)
    response = torch.zeros_like(query_ids, dtype=torch.bool)
    response[:, -RESPONSE_TOKENS:] = True
    batch = MetaBatch(
        context_ids,
        torch.ones_like(context_ids, dtype=torch.bool),
        query_ids,
        torch.ones_like(response),
        response,
    )
    ids = torch.cat([context_ids, query_ids], 1)
    prompt_response = torch.cat([torch.zeros_like(batch.context_mask), response], 1)
    teacher = TeacherTargets.from_model(
        model, ids, torch.ones_like(prompt_response), prompt_response
    )
    steps: dict[str, Callable[[], object]] = {
        "ordinary step": lambda: model(input_ids=ids, labels=ids).loss.backward(),
        "fast_meta_step": lambda: fast_meta_step(model, batch, teacher=teacher),
        "first-order MAML": lambda: fast_meta_step(model, batch, teacher=teacher, first_order=True),
        "sequential exact loop": lambda: reference_meta_step(model, batch, teacher=teacher),
    }
    return batch, teacher, {name: steps[name] for name in case.providers}


def check(model: LlamaForCausalLM, batch: MetaBatch, teacher: TeacherTargets) -> float:
    """The gate: no speed is reported for a wrong gradient."""
    _, expected = gradients_of(reference_meta_step, model, batch, teacher=teacher)
    _, got = gradients_of(fast_meta_step, model, batch, teacher=teacher)
    error, name = worst_error(got, expected)
    if error > 1e-3:
        raise SystemExit(
            f"fast_meta_step is wrong in fp32: {name} has a relative error of {error:.1e}"
        )
    return error


def measure(
    model: LlamaForCausalLM, steps: dict[str, Callable[[], object]], rounds: int
) -> list[dict[str, object]]:
    """Median time over rounds that take turns, and peak bytes over the model and its gradients."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {}
    progress = tqdm(total=(rounds + 1) * len(steps), unit="step")
    for name, step in steps.items():  # also the warm-up
        progress.set_description(f"{name}: memory")
        peaks[name] = peak_bytes_over_model(model, step)
        progress.update()
    for _ in range(rounds):
        for name, step in steps.items():
            progress.set_description(f"{name}: time")
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
            progress.update()
    progress.close()
    return [
        dict(
            provider=name, median_ms=1e3 * statistics.median(seconds[name]), peak_bytes=peaks[name]
        )
        for name in steps
    ]


def revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def print_table(rows: list[dict[str, object]]) -> None:
    base = {row["provider"]: row for row in rows}.get("ordinary step", rows[0])
    print("| provider | time | × ordinary | peak over model and gradients | × ordinary |")
    print("|---|---|---|---|---|")
    for row in rows:
        time_ratio = row["median_ms"] / base["median_ms"]
        memory_ratio = row["peak_bytes"] / base["peak_bytes"]
        print(
            f"| {row['provider']} | {row['median_ms'] / 1e3:.2f} s | {time_ratio:.2f} "
            f"| {row['peak_bytes'] / 1e6:.0f} MB | {memory_ratio:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, default="llama-63m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    case = CASES[arguments.case]
    model = LlamaForCausalLM(case.config).eval()
    batch, teacher, steps = providers(model, case)
    common: dict[str, object] = dict(
        case=arguments.case,
        parameters=sum(p.numel() for p in model.parameters()),
        examples=case.examples,
        context_tokens=case.context_tokens,
        query_tokens=case.query_tokens,
        dtype="float32",
        device=f"CPU {platform.machine()}, {arguments.threads} threads",
        torch=torch.__version__,
        revision=revision(),
    )
    if "sequential exact loop" in steps:
        common["gate_error"] = check(model, batch, teacher)
        print(f"gate: worst relative error of the meta-gradient in fp32 {common['gate_error']:.1e}")
    rows = measure(model, steps, arguments.rounds)
    process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a") as file:
        for row in rows:
            file.write(json.dumps({**common, **row, "process_peak_bytes": process_peak}) + "\n")
    print_table(rows)
    print(f"peak of the whole process (resident): {process_peak / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
