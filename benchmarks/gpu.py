"""Checks, times and measures the Triton kernels, whole steps and commands on a GPU, in 4 minutes.

    python -m benchmarks.gpu                       # needs CUDA; appends to results/gpu.jsonl
    python -m benchmarks.gpu --only '^step'        # what has this in its label; --skip leaves out
    python -m benchmarks.gpu --budget 120          # seconds; nothing begins later
    python -m benchmarks.gpu --tiny                # the same code on a CPU in Triton's interpreter,
                                                   # tiny shapes; the timings mean nothing

First, in many processes beside each other, what is not timed: every pass of every kernel in
``gdprompt_fast.ops.backend.KERNELS`` passes the gate (its error against fp64 at most twice that of
the plain pass plus a floor), so does the step on a tiny model, short commands run, and what the
timed steps need is compiled. Then, one by one: the ceilings that the times are ratios of, whole
steps, the times of the passes. What did not pass its gate is not timed.

A row is appended as it comes. Out of memory, out of time, crashed and failed are rows too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .harness.bench import Bench
from .harness.isolate import Worker, start_method
from .harness.jobs import GOOD, Job, Run, chosen
from .harness.rows import RESULTS, environment
from .ops.kernels import ceiling_jobs, kernel_gates, kernel_times
from .report.gpu import report
from .step.command_line import command_jobs
from .step.whole import gate_jobs, step_jobs, warm_jobs

BUDGET_S = 230
PROCESSES = 16
EXPECTED = (*GOOD, "out of memory", "not available")  # anything else is for a person to look at


def all_jobs(bench: Bench) -> list[Job]:
    """Most telling first, the long ones of those beside each other before the short ones."""
    return [
        *warm_jobs(bench),
        *command_jobs(bench),
        *gate_jobs(bench),
        *kernel_gates(bench),
        *ceiling_jobs(bench),
        *step_jobs(bench),
        *kernel_times(bench),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in Triton's interpreter")
    parser.add_argument("--only", metavar="PATTERN", help="regular expression; see --list")
    parser.add_argument("--skip", metavar="PATTERN", help="regular expression; see --list")
    parser.add_argument("--list", action="store_true", help="print the labels, run nothing")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="beside each other")
    results = RESULTS / "gpu.jsonl"
    parser.add_argument("--results", type=Path, default=results, help="appended to, a row a line")
    parser.add_argument("--revision", help="git's, where there is no git")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    end = time.time() + arguments.budget
    bench = Bench(arguments.tiny)
    jobs = chosen(all_jobs(bench), arguments.only, arguments.skip)
    if arguments.list:
        print("\n".join(each.label for each in jobs))
        return 0
    if not (arguments.tiny or torch.cuda.is_available()):
        raise SystemExit("expected a CUDA device; or give --tiny")
    os.environ["TRITON_INTERPRET"] = "1" if arguments.tiny else "0"  # of the processes to come
    name = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{os.getpid()}"
    common = environment(name, bench.device, arguments.revision)
    context = start_method(
        "cuda"
    )  # spawned on a CPU too: Triton's interpreter wants a fresh import
    run = Run(
        arguments.results,
        common,
        lambda: Worker(context, prepare=bench.prepare),
        end,
        bench.job_limit_s,
    )
    rows = run.do(jobs, arguments.processes)
    print(report(rows))
    return int(not all(row["status"].startswith(EXPECTED) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
