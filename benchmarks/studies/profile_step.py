"""Where the time and the bytes of a meta step go, by op.

    python benchmarks/profile_step.py     # replaces results/profile.jsonl

The model is a Llama of 63 M parameters, the batch 8 x (64 + 16) tokens, on the CPU, with the ops in
PyTorch (before) and in C++ (after).
Every kernel's own time is given to the innermost of our autograd functions around it, in their
forward and backward passes, and split into matrix products and the rest. Bytes are what is
allocated in all, not what is alive at once.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from cases import CASES, random_batch, random_model, self_teacher
from measuring import revision
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from gdprompt_fast import fast_meta_step

BACKENDS = ("torch", "cpp")
RESULTS = Path(__file__).parent / "results" / "profile.jsonl"
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm_"}
PRODUCTS |= {"aten::baddbmm"}
OPS = {
    "_InnerLinear": "linear",
    "_ContextLoss": "vocabulary",
    "_ResponseLoss": "vocabulary",
    "_TiedLookup": "vocabulary",
    "_InnerEmbedding": "embedding",
    "_LoraProduct": "lora",
    "_LoraMaterialise": "lora",
    "_Attention": "attention",
    "_Norm": "norm",
    "_SwiGLU": "swiglu",
    "_Gelu": "gelu",
    "_Rotary": "rotary",
}


def op_of(event: FunctionEvent) -> str:
    """Our op around an event; "model" for what transformers and autograd do between them."""
    at: FunctionEvent | None = event
    while at is not None:
        name = at.name.removeprefix("autograd::engine::evaluate_function: ")
        while name.endswith("Backward"):
            name = name.removesuffix("Backward")
        if name in OPS:
            return OPS[name]
        at = at.cpu_parent
    return "model"


def measure(step: Any) -> list[dict[str, Any]]:
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    totals: dict[str, dict[str, float]] = defaultdict(lambda: dict(products=0, rest=0, bytes=0))
    for event in profiled.events():
        kind = "products" if event.name in PRODUCTS else "rest"
        total = totals[op_of(event)]
        total[kind] += event.self_cpu_time_total
        total["bytes"] += max(0, event.self_cpu_memory_usage)
    whole = sum(t["products"] + t["rest"] for t in totals.values())
    rows = [
        dict(
            op=op,
            share=(t["products"] + t["rest"]) / whole,
            share_products=t["products"] / whole,
            ms=(t["products"] + t["rest"]) / 1e3,
            allocated_bytes=int(t["bytes"]),
        )
        for op, t in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["share"])


def main() -> None:
    case, cpu = CASES["llama-63m"], torch.device("cpu")
    model, batch = random_model(case, cpu, torch.float32), random_batch(case, cpu)
    teacher = self_teacher(model, batch)
    common = {
        "revision": revision(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    rows = [
        {**row, "backend": backend, **common}
        for backend in BACKENDS
        for row in measure(
            functools.partial(fast_meta_step, model, batch, teacher=teacher, backend=backend)
        )
    ]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("| backend | op | time | of it matrix products | allocated |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['backend']} | {row['op']} | {row['ms']:,.0f} ms, {row['share']:.1%} | "
            f"{row['share_products']:.1%} | {row['allocated_bytes'] / 1e6:,.0f} MB |"
        )


if __name__ == "__main__":
    main()
