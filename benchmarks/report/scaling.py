"""Writes the scaling table of docs/distributed.md, from the plan's predictions.

python -m benchmarks.report.scaling
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoConfig

from gdprompt_fast.artifacts.markdown import markdown_table
from gdprompt_fast.plan import PlannedStep, plan_many
from gdprompt_fast.plan.many import Communication, ManyGPUs

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "distributed.md"
CONFIGS = ROOT / "tests" / "plan" / "configs"
MODELS = {"Llama 3.2 1B": "llama-3.2-1b.json", "Llama 3.1 8B": "llama-3.1-8b.json"}
EXAMPLES = 16  # on each GPU
FLOPS = 450e12  # a second: what an H200 reached on the 1B model's step, by the plan's count
BANDWIDTHS = {8: 450e9, 64: 50e9, 512: 50e9}  # bytes a second: NVLink; 400 Gb/s for each GPU
BEGIN, END = "<!-- scaling table -->", "<!-- end of scaling table -->"


def planned(gpus: int, sharding: str) -> PlannedStep:
    recompute = "block" if sharding == "full" else "none"
    return PlannedStep(batch=EXAMPLES * gpus, context=256, query=32, recompute=recompute)


def row(model: str, many: ManyGPUs) -> list[str]:
    name, rest = [model, str(many.gpus), many.sharding], times(many.gpus, many.sent, many.flops)
    return [*name, f"{many.peak_bytes / 1e9:,.0f} GB", *rest]


def times(gpus: int, sent: Communication, flops: float) -> list[str]:
    """What each sends, the time of computing and of sending, and the examples for balance."""
    computing, sending = flops / FLOPS, sent.bytes / BANDWIDTHS[gpus]
    return [
        f"{sent.bytes / 1e9:,.1f} GB",
        f"{computing:.2f} s",
        f"{sending:.2f} s",
        f"{max(1, EXAMPLES * sending / computing):.0f}",
    ]


def table() -> str:
    heading = ["model", "GPUs", "sharding", "memory of each", "each sends", "computing", "sending"]
    rows = [[*heading, "examples a GPU for balance"]]
    for name, file in MODELS.items():
        config = AutoConfig.from_pretrained(CONFIGS / file)
        for gpus in BANDWIDTHS:
            for sharding in ("none", "optimizer", "full"):
                many = plan_many(config, planned(gpus, sharding), gpus, sharding)
                rows.append(row(name, many))
    return markdown_table(rows)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    page = re.sub(f"{BEGIN}.*{END}", f"{BEGIN}\n{table()}\n{END}", page, flags=re.S)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
