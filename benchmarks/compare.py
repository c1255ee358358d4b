"""Every way to take the step, on the same model, batch and loss: time, memory and throughput.

    python -m benchmarks.compare                        # Llama of 63 M parameters, all ways
    python -m benchmarks.compare --case llama-1b --ways ordinary fast     # needs 16 GB
    python -m benchmarks.compare --sweep all              # and figures in results/figures/

The gate comes first: the gradient of every way is the reference's. Then each way of each case is
measured in a process of its own, its time in turns with the ordinary step's, so that their ratio
survives a machine whose speed changes. Running out of memory or time, and a crash, are rows too.
In a sweep, a way stops behind the first point that fails or whose step takes too long; the points
it was spared are rows as well.

Rows are appended to results/compare.jsonl as they come. Starting the same revision again, or the
same ``--run``, goes on where it stopped: what came to no result is tried again, and so is what was
measured in another way (``--threads``, ``--seconds``, ``--memory-limit``).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .harness.isolate import Worker, start_method
from .harness.rows import RESULTS, Row, append, environment, revision, row_of, rows_of
from .report import figures
from .report.tables import markdown, number, ratio
from .step.baselines import WAYS
from .step.cases import CASES, RANGES, TINY, Case, points
from .step.measuring import Settings, gate_name, gate_of, work

DEFAULT_RESULTS = RESULTS / "compare.jsonl"
GOOD = ("measured", "passed", "out of memory")


@dataclass(frozen=True)
class Measurement:
    """A row to be. ``sweep`` is empty for a case on its own."""

    kind: str
    sweep: str
    name: str
    case: Case
    way: str

    def row(self) -> Row:
        known = dict(kind=self.kind, sweep=self.sweep, case=self.name, provider=self.way)
        return row_of(**known, **self.case.shapes())


def same_way(row: Row, common: Row) -> bool:
    """Whether a row was measured as these will be."""
    names = ("device", "dtype", "threads", "seconds", "memory_limit_bytes")
    return all(row.get(name) == common.get(name) for name in names)


def key(row: Row) -> tuple[str, ...]:
    return row["kind"], row["sweep"], row["case"], row["provider"]


def plan(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """The gates that the cases need, and then their measurements."""
    over = RANGES["tiny" if arguments.tiny else arguments.device]
    cases = [("", name, TINY if arguments.tiny else CASES[name]) for name in arguments.case]
    for sweep in arguments.sweep:
        axis = figures.AXES[sweep].column
        for case in points(sweep, over):
            value = case.config.hidden_size if sweep == "size" else case.shapes()[axis]
            cases.append((sweep, f"{sweep} {value}", case))
    for name, case in {gate_name(case): gate_of(case) for _, _, case in cases}.items():
        for way in arguments.ways:
            if way != "ordinary":
                yield Measurement("gate", "", name, case, way)
    for sweep, name, case in cases:
        for way in arguments.ways:
            yield Measurement("time", sweep, name, case, way)


def run(
    measurements: list[Measurement], arguments: argparse.Namespace, settings: Settings, common: Row
) -> None:
    """Appends the rows that the run does not have yet."""
    context = start_method(settings.device)
    rows = rows_of(arguments.results, arguments.run)
    done = {key(row): row for row in rows if row["status"] in GOOD and same_way(row, common)}
    stopped: dict[tuple[str, str], str] = {}  # a sweep and a way, or a failed gate, and why
    progress = tqdm(measurements, unit="row")
    for m in progress:
        progress.set_description(f"{m.kind}: {m.name}, {m.way}")
        row = {**m.row(), **common}
        if key(row) in done:
            row = done[key(row)]
        else:
            row |= outcome(m, context, arguments, settings, stopped)
            append(arguments.results, row)
        if why := reason_to_stop(row, arguments.step_limit):
            stopped.setdefault((m.name if m.kind == "gate" else m.sweep, m.way), why)


def outcome(
    m: Measurement,
    context: Any,
    arguments: argparse.Namespace,
    settings: Settings,
    stopped: dict[tuple[str, str], str],
) -> Row:
    if m.kind == "time":
        why = stopped.get((gate_name(m.case), m.way))
        if m.sweep:
            why = why or stopped.get((m.sweep, m.way))
        if why:
            return {"status": f"not run: {why}"}
    with Worker(context, settings.memory_limit_bytes) as worker:
        return worker.run(arguments.limit, work, m.kind, m.case, m.way, settings)


def reason_to_stop(row: Row, step_limit_s: float) -> str | None:
    if row["kind"] == "gate":
        return None if row["status"] == "passed" else "gate not passed"
    if row["status"] != "measured":
        return f"{row['status']} at {row['case']}"
    if row["median_ms"] > 1e3 * step_limit_s:
        return f"a step took {row['median_ms'] / 1e3:.0f} s at {row['case']}"
    return None


# The result


def table(rows: list[Row]) -> str:
    """Where rows measure the same, the last one counts."""
    rows = list({key(row): row for row in rows}.values())
    header = ["case", "way", "ms", "× ordinary", "peak MB over model and gradients", "× ordinary"]
    timed = [row for row in rows if row["kind"] == "time"]
    floors = {r["case"]: r["peak_bytes"] for r in timed if r["provider"] == "ordinary"}
    lines = []
    for row in timed:
        cells = [row["case"], row["provider"], row["status"], "", "", ""]
        if row["status"] == "measured":
            cells[2:4] = f"{row['median_ms']:,.1f}", number(row["ratio_to_ordinary"], "{:.2f}")
            cells[4:] = (
                f"{row['peak_bytes'] / 1e6:,.1f}",
                ratio(row["peak_bytes"], floors.get(row["case"])),
            )
        lines.append(cells)
    gates = [row for row in rows if row["kind"] == "gate"]
    passed = [row for row in gates if row["status"] == "passed"]
    said = [f"gates: {len(passed)} of {len(gates)} passed"]
    said += [f"- {r['provider']}, {r['case']}: {r['status']}" for r in gates if r not in passed]
    return "\n".join([markdown(header, lines), "", *said])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", nargs="+", choices=CASES, help="llama-63m, if no sweep is given")
    add("--sweep", nargs="+", choices=[*figures.AXES, "all"], default=[])
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=int, default=torch.get_num_threads())
    add(
        "--seconds",
        type=float,
        default=3,
        help="of timed rounds in a measurement; at least three are done",
    )
    add("--step-limit", type=float, default=5, help="seconds; a longer step ends a way's sweep")
    add("--limit", type=float, default=600, help="seconds; a longer measurement is ended")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    add("--memory-limit", type=float, default=0.85 * memory, help="GB of a process on a CPU")
    add("--tiny", action="store_true", help="tiny shapes, to see that everything runs")
    add("--results", type=Path, default=DEFAULT_RESULTS, help="appended to, a row a line")
    add("--revision", default=revision(), help="git's, where there is no git")
    add("--run", help="goes on with the run of this name; the revision's own by default")
    arguments = parser.parse_args(argv)
    if arguments.tiny and arguments.results == DEFAULT_RESULTS:
        parser.error("--tiny: expected --results of another file, for rows that mean nothing")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if "all" in arguments.sweep:
        arguments.sweep = list(figures.AXES)
    if arguments.case is None:
        arguments.case = [] if arguments.sweep else ["llama-63m"]
    if arguments.run is None:
        arguments.run = f"{arguments.revision}-{arguments.device}" + "-tiny" * arguments.tiny
        if arguments.revision == "unknown" or arguments.revision.endswith("-dirty"):
            arguments.run += time.strftime("-%Y-%m-%dT%H:%M:%S")  # not what it was last time
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    on_cuda = arguments.device == "cuda"
    settings = Settings(
        device=arguments.device,
        dtype="bfloat16" if on_cuda else "float32",
        threads=arguments.threads,
        seconds=0 if arguments.tiny else arguments.seconds,
        memory_limit_bytes=0 if on_cuda else int(1e9 * arguments.memory_limit),
        tiny=arguments.tiny,
    )
    common = dict(
        environment(arguments.run, torch.device(arguments.device), arguments.revision),
        dtype=settings.dtype,
        threads=settings.threads,
        seconds=settings.seconds,
        memory_limit_bytes=settings.memory_limit_bytes,
    )
    try:
        run(list(plan(arguments)), arguments, settings, common)
    except KeyboardInterrupt:
        print(f"\nstopped; go on with --run {arguments.run}", file=sys.stderr)
        return 130
    rows = rows_of(arguments.results, arguments.run)
    print(table(rows))
    folder = arguments.results.parent / "figures"
    for sweep in arguments.sweep:
        print(figures.draw(rows, sweep, folder / figures.file_name(sweep, arguments.device)))
    last = {key(row): row["status"] for row in rows}.values()
    explained = (*GOOD, "not run", "out of time")
    return int(not all(status.startswith(explained) for status in last))


if __name__ == "__main__":
    sys.exit(main())
