"""Writes the newest measured rows into the README's table, so that no number is typed by hand.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- engine table -->", "<!-- end of engine table -->"
CASES = {
    "llama-63m": "Llama, 63 M parameters, 8 examples, 64 + 16 tokens",
    "llama-1b": "Shape of Llama 3.2 1B, 16 examples, 16 + 8 tokens",
}


def newest(rows: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    """The newest row of every provider of a case, in the order they were measured."""
    by_provider = {row["provider"]: row for row in rows if row["case"] == case}
    return list(by_provider.values())


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | way | time of a step | × ordinary step | peak over model and gradients | × "
        "ordinary |",
        "|---|---|---|---|---|---|",
    ]
    for case, title in CASES.items():
        measured = newest(rows, case)
        base = next((r for r in measured if r["provider"] == "ordinary step"), None)
        for row in measured:
            seconds, megabytes = row["median_ms"] / 1e3, row["peak_bytes"] / 1e6
            times = f"{row['median_ms'] / base['median_ms']:.2f}" if base else "–"
            bytes_ratio = f"{row['peak_bytes'] / base['peak_bytes']:.2f}" if base else "–"
            way = row["provider"].replace("fast_meta_step", "**`fast_meta_step`**")
            lines.append(
                f"| {title} | {way} | {seconds:.2f} s | {times} | {megabytes:,.0f} MB | "
                f"{bytes_ratio} |"
            )
    return "\n".join(lines)


def footnote(rows: list[dict[str, Any]]) -> str:
    last = next(row for row in reversed(rows) if row["case"] in CASES)
    text = (
        f"{last['dtype']}, {last['device']}, torch {last['torch']}, medians of one run each; "
        "rows in `benchmarks/results/engine.jsonl`."
    )
    for row in newest(rows, "llama-1b"):
        peak = row["process_peak_bytes"] / 1e9
        text += f" The whole process of the 1 B {row['provider']} peaked at {peak:.1f} GB."
    return text


def main() -> None:
    lines = (HERE / "results" / "engine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    block = f"{BEGIN}\n{table(rows)}\n\n{footnote(rows)}\n{END}"
    text = README.read_text()
    README.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: block, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
