"""Every way to take the step, on the same model, batch and loss: time, memory and throughput.

    python benchmarks/compare.py                          # Llama of 63 M parameters, all ways
    python benchmarks/compare.py --case llama-1b --ways ordinary fast     # needs 16 GB
    python benchmarks/compare.py --sweep all              # and figures in results/figures/

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

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # the package need not be installed

import argparse
import functools
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import figures
import torch
from baselines import FIRST_ORDER, WAYS, Task, ordinary
from cases import (
    CASES,
    RANGES,
    RESPONSE_TOKENS,
    TINY,
    Case,
    points,
    random_batch,
    random_model,
    self_teacher,
)
from measuring import Row, append, measure_memory, quantiles, release, revision, rows_of, seconds_of
from tqdm import tqdm

from gdprompt_fast import __version__, reference_meta_step
from gdprompt_fast.models.memory import model_tensors
from gdprompt_fast.ops.backend import resolve_backend
from gdprompt_fast.reference.compare import gradients_of, without_upcasts, worst_error

RESULTS = Path(__file__).parent / "results" / "compare.jsonl"
PRELOADED = [
    "transformers.models.llama.modeling_llama",
    "peft",
    "matplotlib.figure",
    "gdprompt_fast",
]
ALLOWED_ERROR = 1e-4  # of a meta-gradient in fp32; the first-order one is off by more than 1e-2
LEAST_ROUNDS, MOST_ROUNDS = 3, 20
GOOD = ("measured", "passed", "out of memory")

EMPTY: Row = {
    **dict.fromkeys(("kind", "sweep", "case", "provider", "backend", "status")),
    **dict.fromkeys(("examples", "context_tokens", "query_tokens", "response_tokens")),
    **dict.fromkeys(("parameters", "layers", "hidden", "vocabulary", "rank", "inner_params")),
    **dict.fromkeys(("p20_ms", "median_ms", "p80_ms", "repeats")),
    **dict.fromkeys(("ordinary_ms", "ratio_to_ordinary", "tokens_per_s")),
    **dict.fromkeys(("peak_bytes", "process_peak_bytes")),
    **dict.fromkeys(("flops", "ceiling_flops_per_s", "flop_utilisation", "error")),
}


@dataclass(frozen=True)
class Settings:
    """How to measure; the same for a whole run."""

    device: str
    dtype: str
    threads: int
    seconds: float
    memory_limit_bytes: int
    tiny: bool


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
        return {**EMPTY, **known, **self.case.shapes()}


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


# What a process of its own does


def task_of(case: Case, device: torch.device, dtype: torch.dtype, **options: Any) -> Task:
    model = random_model(case, device, dtype)
    batch = random_batch(case, device)
    return Task(model, batch, self_teacher(model, batch), inner_params=case.inner_params, **options)


def gate_of(case: Case) -> Case:
    """A tiny case of the same kind."""
    return replace(TINY, rank=min(case.rank, 2), inner_params=case.inner_params)


def gate_name(case: Case) -> str:
    return f"tiny, LoRA outside, {case.inner_params} inside" if case.rank else "tiny"


def gate(case: Case, way: str, settings: Settings) -> Row:
    """The error of a way's gradient in fp32 against the reference's in fp64."""
    device = torch.device(settings.device)
    task = task_of(case, device, torch.float32, inner_lr=0.05)
    _, got = gradients_of(lambda *_: WAYS[way](task), task.model, task.batch)
    wide = task_of(case, device, torch.float64)
    wide.model.load_state_dict(task.model.state_dict())
    wide_teacher = replace(
        task.teacher, hidden=task.teacher.hidden.double(), head=task.teacher.head.double()
    )
    with without_upcasts(wide.model):
        _, exact = gradients_of(
            reference_meta_step,
            wide.model,
            task.batch,
            inner_lr=task.inner_lr,
            inner_params=case.inner_params,
            teacher=wide_teacher,
            first_order=way in FIRST_ORDER,
        )
    error, name = worst_error(got, exact)
    passed = error <= ALLOWED_ERROR
    status = "passed" if passed else f"failed: wrong in {name}"
    return dict(error=error, dtype="float32", status=status)


def measure(case: Case, way: str, settings: Settings) -> Row:
    """Memory, then time in turns with the ordinary step."""
    device = torch.device(settings.device)
    dtype = getattr(torch, settings.dtype)
    task = task_of(case, device, dtype)
    tensors = model_tensors(task.model)

    memory = measure_memory(device, functools.partial(WAYS[way], task), tensors)
    row: Row = dict(
        backend=resolve_backend("auto", device, dtype) if way.startswith("fast") else "torch",
        peak_bytes=memory["peak_bytes"] - memory["held_bytes"],
        process_peak_bytes=process_peak(device),
        flops=step_flops(case, way, task),
        ceiling_flops_per_s=matrix_rate(device, settings),
    )
    times_ms, ordinary_ms = in_turns(device, task, way, settings.seconds)
    row |= quantiles(times_ms)
    seconds = row["median_ms"] / 1e3
    if ordinary_ms:
        row["ordinary_ms"] = statistics.median(ordinary_ms)
        ratios = [t / base for t, base in zip(times_ms, ordinary_ms, strict=True)]
        row["ratio_to_ordinary"] = statistics.median(ratios)
    row["tokens_per_s"] = case.examples * (case.context_tokens + case.query_tokens) / seconds
    row["flop_utilisation"] = row["flops"] / seconds / row["ceiling_flops_per_s"]
    return {**row, "status": "measured"}


def in_turns(
    device: torch.device, task: Task, way: str, seconds: float
) -> tuple[list[float], list[float]]:
    """Milliseconds of a way and of the ordinary step after it, as many rounds as fit; at least
    three, or one where there is no time.

    Where only the ordinary step runs out of memory, its list is empty.
    """
    step, base = functools.partial(WAYS[way], task), functools.partial(ordinary, task)
    with_base = way == "ordinary" or fits(device, base)
    times: list[float] = []
    base_times: list[float] = []
    end = time.perf_counter() + seconds
    least = LEAST_ROUNDS if seconds else 1
    while len(times) < least or (time.perf_counter() < end and len(times) < MOST_ROUNDS):
        times.append(1e3 * seconds_of(device, step))
        if way == "ordinary":
            base_times.append(times[-1])
        elif with_base:
            base_times.append(1e3 * seconds_of(device, base))
    return times, base_times


def fits(device: torch.device, call: Callable[[], object]) -> bool:
    """Whether there is memory for a call; also its warm-up."""
    try:
        call()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        release(device)
    return True


def process_peak(device: torch.device) -> int:
    """The most that the process held: resident, or reserved on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_flops(case: Case, way: str, task: Task) -> float:
    """What a step must compute, whatever the way computes; for the exact ways

        12 P T_c + 6 P T_q        (LoRA outside: 8 P T_c + 4 P T_q)

    where P counts the matrices, the head only where there are logits to make (every token of a
    context, the predicted ones of a query), and causal attention to T tokens as hidden · T more a
    layer.
    """
    backward = 1 if case.rank else 2  # in forward passes: no gradients of frozen matrices
    context = {"ordinary": 1 + backward, **dict.fromkeys(FIRST_ORDER, 2)}
    tokens, asked = case.context_tokens, case.query_tokens
    texts = [
        (context.get(way, 2 + 2 * backward), tokens, tokens),
        (1 + backward, asked, RESPONSE_TOKENS),
    ]
    if way == "ordinary":
        texts = [(1 + backward, tokens + asked, tokens + asked)]
    matrices = sum(p.numel() for p in task.model.parameters() if p.dim() == 2)
    head = case.config.vocab_size * case.config.hidden_size  # tied to the embedding
    width = case.config.num_hidden_layers * case.config.hidden_size
    return float(
        sum(
            2 * n * case.examples * (text * (matrices - head + width * text) + predicted * head)
            for n, text, predicted in texts
        )
    )


def matrix_rate(device: torch.device, settings: Settings) -> float:
    """FLOP/s of a large product of random numbers, the best of five."""
    size = 32 if settings.tiny else 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, settings.dtype))
    return 2 * size**3 / min(seconds_of(device, lambda: a @ b) for _ in range(5))


def is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error) or "bad_alloc" in str(error)


def child(
    connection: Connection, memory_limit_bytes: int, function: Callable[..., Row], *arguments: Any
) -> None:
    """Sends what the function returns, or why it does not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its child itself
    if memory_limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit_bytes, memory_limit_bytes))
    try:
        result = function(*arguments)
    except Exception as error:
        out = is_out_of_memory(error)
        text = f"error: {type(error).__name__}: {error}"[:600]
        result = {"status": "out of memory" if out else text}
    connection.send(result)


def work(kind: str, case: Case, way: str, settings: Settings) -> Row:
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' own
    torch.set_num_threads(settings.threads)
    gc.freeze()  # a collection need not look at the libraries again
    return {"gate": gate, "time": measure}[kind](case, way, settings)


# The process that waits


def in_a_process(
    context: Any,
    limit_s: float,
    memory_limit_bytes: int,
    function: Callable[..., Row],
    *arguments: Any,
) -> Row:
    """What the function returns in a process of its own, or a status that says why not."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=child, args=(sender, memory_limit_bytes, function, *arguments), daemon=True
    )
    process.start()
    sender.close()  # so that the end of the process is the end of the pipe
    try:
        if not receiver.poll(limit_s):
            return {"status": f"out of time: more than {limit_s:.0f} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"status": f"crashed: exit status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def start_method(device: str) -> Any:
    """Forks of a server that has imported everything; CUDA does not survive a fork."""
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


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
    return in_a_process(
        context,
        arguments.limit,
        settings.memory_limit_bytes,
        work,
        m.kind,
        m.case,
        m.way,
        settings,
    )


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
    lines = ["| case | way | ms | × ordinary | peak MB over model and gradients | × ordinary |"]
    lines.append("|---|---|---|---|---|---|")
    timed = [row for row in rows if row["kind"] == "time"]
    floors = {r["case"]: r["peak_bytes"] for r in timed if r["provider"] == "ordinary"}
    for row in timed:
        cells = [row["case"], row["provider"]]
        if row["status"] == "measured":
            floor = floors.get(row["case"])
            ratio = row["ratio_to_ordinary"]
            cells += [f"{row['median_ms']:,.1f}", f"{ratio:.2f}" if ratio else ""]
            cells.append(f"{row['peak_bytes'] / 1e6:,.1f}")
            cells.append(f"{row['peak_bytes'] / floor:.2f}" if floor else "")
        else:
            cells += [row["status"], "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    gates = [row for row in rows if row["kind"] == "gate"]
    passed = [row for row in gates if row["status"] == "passed"]
    lines += ["", f"gates: {len(passed)} of {len(gates)} passed"]
    for row in gates:
        if row not in passed:
            lines.append(f"- {row['provider']}, {row['case']}: {row['status']}")
    return "\n".join(lines)


def packages() -> dict[str, str | None]:
    """The versions that a row names; None where a package is not installed."""
    versions: dict[str, str | None] = {"gdprompt_fast": __version__}
    for name in ("torch", "transformers", "peft", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join(["CPU", platform.machine(), *models[:1]])


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
    add("--results", type=Path, default=RESULTS, help="appended to, a row a line")
    add("--revision", default=revision(), help="git's, where there is no git")
    add("--run", help="goes on with the run of this name; the revision's own by default")
    arguments = parser.parse_args(argv)
    if arguments.tiny and arguments.results == RESULTS:
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
        run=arguments.run,
        dtype=settings.dtype,
        device=device_name(arguments.device),
        threads=settings.threads,
        seconds=settings.seconds,
        memory_limit_bytes=settings.memory_limit_bytes,
        **packages(),
        revision=arguments.revision,
        dirty=arguments.revision.endswith("-dirty"),
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
