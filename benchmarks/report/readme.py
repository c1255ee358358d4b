"""Writes the newest measured rows into the tables of docs/measured.md and, shorter, of the README,
so that no number is typed by hand.

python -m benchmarks.report.readme
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..harness.rows import RESULTS, ROOT, Row, rows_of
from ..step.baselines import WAYS
from ..step.cases import CASES
from .figures import file_name

README, PAGE = ROOT / "README.md", ROOT / "docs" / "measured.md"
BEGIN, END = "<!-- engine table -->", "<!-- end of engine table -->"
NAMES = {
    "ordinary": "ordinary step",
    "fast": "**`fast_meta_step`**",
    "fast recomputed": '`fast_meta_step`, `recompute="block"`',
    "fast first-order": "`fast_meta_step`, first-order",
    "sequential": "sequential exact MAML",
    "sequential first-order": "sequential first-order MAML",
    "forward-over-reverse": "forward-over-reverse",
    "all-alive": "all graphs alive",
    "vmap": "vmap",
}
FIGURES = ("examples", "context")
# What the README shows.
SHORT_CASES = ("llama-63m",)
SHORT_WAYS = ("ordinary", "fast", "fast recomputed", "sequential", "vmap")


def newest(rows: list[Row], device: str, case: str) -> list[Row]:
    """The newest row of every way of a case that came to a result, in the order of WAYS; all of
    the run that measured the case last.
    """
    of_case = [r for r in rows if (r["kind"], r["case"], r["device"]) == ("time", case, device)]
    results = [r for r in of_case if r["status"] in ("measured", "out of memory")]
    by_way = {row["provider"]: row for row in results if row["run"] == results[-1]["run"]}
    return [by_way[way] for way in WAYS if way in by_way]


def title(row: Row) -> str:
    size = row["parameters"]
    parameters = f"{size / 1e9:.2f} G" if size >= 1e9 else f"{size / 1e6:.0f} M"
    tokens = f"{row['context_tokens']} + {row['query_tokens']} tokens"
    return f"Llama, {parameters} parameters, {row['examples']} examples, {tokens}"


def table(rows: list[Row], device: str, cases: Sequence[str], ways: Sequence[str]) -> str:
    lines = [
        "| case | way | time of a step | × ordinary step | peak over model and gradients | × "
        "ordinary |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        measured = newest(rows, device, case)
        floor = next((r["peak_bytes"] for r in measured if r["provider"] == "ordinary"), None)
        for row in (row for row in measured if row["provider"] in ways):
            cells = [title(row), NAMES[row["provider"]]]
            if row["status"] == "measured":
                ratio = row["ratio_to_ordinary"]
                cells += [f"{row['median_ms'] / 1e3:.2f} s", f"{ratio:.2f}" if ratio else "–"]
                cells.append(f"{row['peak_bytes'] / 1e6:,.0f} MB")
                cells.append(f"{row['peak_bytes'] / floor:.2f}" if floor else "–")
            else:
                cells += [row["status"], "–", "–", "–"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def footnote(rows: list[Row], device: str, cases: Sequence[str], ways: Sequence[str]) -> str:
    found = [row for case in cases for row in newest(rows, device, case)]
    shown = [row for row in found if row["provider"] in ways]
    rounds = [row["repeats"] for row in shown if row["status"] == "measured"]
    if not rounds:
        return ""
    last = shown[-1]
    text = (
        f"{last['dtype']}, {device}, {last['threads']} threads, torch {last['torch']}; medians "
        f"of at least {min(rounds)} rounds, "
        "each in turns with the ordinary step; rows in `benchmarks/results/compare.jsonl`."
    )
    backends = sorted({row["backend"] for row in shown if "fast" in row["provider"]} - {None})
    text += f" `fast_meta_step` ran with backend {', '.join(backends)}." * bool(backends)
    for row in shown:
        if row["case"] == "llama-1b" and row["provider"] == "fast":
            peak = row["process_peak_bytes"] / 1e9
            text += f" The whole process of the 1 B `fast_meta_step` peaked at {peak:.1f} GB."
    return text


def figures(rows: list[Row], device: str) -> str:
    kind = "cpu" if device.startswith("CPU") else "cuda"
    paths = [(sweep, RESULTS / "figures" / file_name(sweep, kind)) for sweep in FIGURES]
    return "\n\n".join(
        f"![Time and peak memory of a step against {sweep}](../{path.relative_to(ROOT)})"
        for sweep, path in paths
        if path.exists()
    )


def block(rows: list[Row]) -> str:
    """A table, a footnote and figures for every device with a measured case."""
    parts = []
    for device in _devices(rows):
        parts += [part(rows, device, tuple(CASES), tuple(WAYS)) for part in (table, footnote)]
        parts.append(figures(rows, device))
    return "\n\n".join(filter(None, parts))


def short_block(rows: list[Row]) -> str:
    """A few ways of one case, and a footnote, for every device."""
    return "\n\n".join(
        part(rows, device, SHORT_CASES, SHORT_WAYS)
        for device in _devices([row for row in rows if row["case"] in SHORT_CASES])
        for part in (table, footnote)
    )


def _devices(rows: list[Row]) -> dict[str, None]:
    timed = [row for row in rows if row["kind"] == "time" and row["case"] in CASES]
    return dict.fromkeys(row["device"] for row in timed)


def pages(rows: list[Row]) -> dict[Path, str]:
    """The pages with a table, as they are with these rows."""
    found = {}
    for path, content in ((README, short_block(rows)), (PAGE, block(rows))):
        before, _, rest = path.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        found[path] = f"{before}{BEGIN}\n{content}\n{END}{after}"
    return found


def main() -> None:
    rows = rows_of(RESULTS / "compare.jsonl")
    if not block(rows):
        raise SystemExit("expected a case of cases.py in results/compare.jsonl; run compare.py")
    for path, text in pages(rows).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
