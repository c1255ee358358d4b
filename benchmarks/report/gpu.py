"""What a run of ``benchmarks.gpu`` says: tables, and every row that is not as it should be."""

from __future__ import annotations

from collections import defaultdict

from gdprompt_fast.testing.op_inputs import PASS_NAMES

from ..harness.jobs import GOOD
from ..harness.rows import EMPTY, Row
from .tables import markdown, number, ratio


def report(rows: list[Row]) -> str:
    parts = [step_table(rows), command_table(rows), kernel_table(rows), summary(rows)]
    return "\n\n".join(filter(None, parts))


def step_table(rows: list[Row]) -> str:
    """Against the ordinary step and the sequential loops of the same case."""
    steps = [row for row in rows if (row["op"], row["kind"]) == ("step", "time")]
    if not steps:
        return ""
    times: dict[str, dict[str, float]] = defaultdict(dict)
    for row in steps:
        times[row["case"]][row["provider"]] = row["median_ms"]
    header = ["case", "step", "ms", "of it CPU", "× ordinary", "sequential ÷", "its graph ÷"]
    header += ["of matrix rate", "peak GB", "reserved GB", "captured"]
    lines = []
    for row in steps:
        base = times[row["case"]]
        cells = [row["case"], row["provider"], number(row["median_ms"], "{:.1f}") or row["status"]]
        cells.append(number(row["cpu_ms"], "{:.1f}"))
        cells.append(number(row["ratio_to_ordinary"], "{:.2f}"))
        cells.append(ratio(base.get("sequential"), row["median_ms"]))
        cells.append(ratio(base.get("sequential, CUDA graph"), row["median_ms"]))
        cells.append(number(row["ceiling_ratio"], "{:.0%}"))
        cells += [number(row[n], "{:.2f}", 1e-9) for n in ("peak_bytes", "reserved_bytes")]
        cells.append({True: "yes", False: "no", None: ""}[row["captured"]])
        lines.append(cells)
    return markdown(header, lines)


def command_table(rows: list[Row]) -> str:
    commands = [row for row in rows if row["kind"] == "command"]
    lines = [
        [
            f"gdprompt {row['pass']}",
            row["status"],
            row["exit_code"],
            number(row["elapsed_s"], "{:.1f}"),
            number(row["first_loss"], "{:.3f}"),
            number(row["last_loss"], "{:.3f}"),
        ]
        for row in commands
    ]
    header = ["command", "status", "exit code", "seconds", "first losses", "last losses"]
    return markdown(header, lines) if lines else ""


def kernel_table(rows: list[Row]) -> str:
    """Kernels beside the plain passes."""
    pairs: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["kind"] == "time" and row["op"] != "step":
            pairs[row["pass"], row["case"]][row["provider"]] = row
    header = ["pass", "case", "Triton ms", "speed-up", "of ceiling", "eager's", "own MB", "eager's"]
    lines = []
    for (pass_, name), pair in pairs.items():
        ours, eager = pair.get("triton", EMPTY), pair.get("eager", EMPTY)
        cells = [pass_, name, number(ours["median_ms"], "{:.3f}") or ours["status"]]
        cells.append(ratio(eager["median_ms"], ours["median_ms"]))
        cells += [number(row["ceiling_ratio"], "{:.0%}") for row in (ours, eager)]
        cells += [number(own_bytes(row), "{:,.0f}", 1e-6) for row in (ours, eager)]
        lines.append(cells)
    return markdown(header, lines) if lines else ""


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
        if row["provider"] and "captured" in row["provider"] and row["why_eager"]:
            lines.append(f"- {row['provider']}, {row['case']}: not captured: {row['why_eager']}")
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
