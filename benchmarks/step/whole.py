"""Whole steps on a GPU: this package's beside the ordinary step and the sequential exact loop, each
as it comes and as the strongest it can be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gdprompt_fast import TeacherTargets, fast_meta_step, reference_meta_step
from gdprompt_fast.models.memory import model_tensors
from gdprompt_fast.reference.compare import gradients_of, without_upcasts, worst_error
from gdprompt_fast.reference.lean_maml import Episode, LeanMAML, sequential
from gdprompt_fast.testing.op_inputs import drawer

from ..harness.bench import Bench
from ..harness.jobs import Job, job
from ..harness.rows import Row
from ..harness.timing import measure_step
from .baselines import meta_step, ordinary
from .cases import CASES, LLAMA_8B, Case, llama, random_batch, random_model, self_teacher
from .flops import step_flops
from .graphs import as_graph, causal_attention

MICRO_GROUPS = 2

ONE_B = CASES["llama-1b"]
SHAPES = {
    "16 x (256 + 32)": replace(ONE_B, context_tokens=256, query_tokens=32),
    "16 x (16 + 8)": ONE_B,
    "4 x (2048 + 64)": replace(ONE_B, examples=4, context_tokens=2048, query_tokens=64),
    "8B, LoRA 16 outside, 16 x (256 + 32)": Case(LLAMA_8B, 16, 256, 32, rank=16),
}
MAIN, SHORT, LONG, LORA = SHAPES
TINY_CONFIG = llama(16, 1, 1, 1, 24, 32)


def shape_of(name: str, tiny: bool) -> Case:
    full = SHAPES[name]
    if not tiny:
        return full
    few = replace(full, examples=2, context_tokens=4, query_tokens=5, rank=min(full.rank, 2))
    return replace(few, config=TINY_CONFIG)


def is_autocast(shape: Case) -> bool:
    """Of fp32 weights to bf16; a frozen base is in bf16 itself."""
    return not shape.rank


# Gates

KL = dict(objective="kl")
# The options of fast_meta_step, and whether it runs under autocast to bf16.
STEP_GATES: dict[str, tuple[dict[str, Any], bool]] = {
    "second_order": ({}, False),
    "first_order": (dict(first_order=True), False),
    "kl_recompute": ({**KL, "recompute": "block"}, False),
    "kl_micro_groups": ({**KL, "micro_groups": 2}, False),
    "kl_autocast": (KL, True),
    "kl_autocast_captured": ({**KL, "capture": "auto"}, True),
}


def gate_shape(tiny: bool) -> Case:
    return shape_of(MAIN, tiny) if tiny else CASES["tiny"]


def gate_step(bench: Bench, name: str) -> Row:
    """The gradients of a tiny fp32 model on Triton against the reference in fp64; the third step of
    three where steps are captured, on CUDA, which is then a replay.
    """
    options, autocast = STEP_GATES[name]
    shape = gate_shape(bench.tiny)
    model = random_model(shape, bench.device, torch.float32)
    batch = random_batch(shape, bench.device)
    plain_options = {"objective": "gold", "inner_lr": 0.05, **options}
    plain_options.pop("capture", None)
    if plain_options["objective"] == "kl":
        draw, size = drawer(bench.device, torch.float32), shape.config.hidden_size
        tokens = int(batch.response_mask.sum())
        head = draw(shape.config.vocab_size, size) * size**-0.5
        plain_options["teacher"] = TeacherTargets(hidden=draw(tokens, size), head=head)
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=autocast):
        for _ in range(3 if "capture" in options and bench.device.type == "cuda" else 1):
            out, on_triton = gradients_of(
                fast_meta_step,
                model,
                batch,
                **{"capture": "never", **options, **plain_options, "backend": "triton"},
            )
        assert out.backend == "triton"
        _, on_torch = gradients_of(
            fast_meta_step, model, batch, backend="torch", capture="never", **plain_options
        )
    plain_options.pop("recompute", None)
    plain_options.pop("micro_groups", None)
    model.double()
    with without_upcasts(model):
        _, exact = gradients_of(reference_meta_step, model, batch, **plain_options)
    error, parameter = worst_error(on_triton, exact)
    plain, _ = worst_error(on_torch, exact)
    allowed = 2 * plain + 1e-3 if autocast else min(2 * plain, 1e-4) + 1e-6
    status = "passed" if error <= allowed else f"failed: error above the allowed in {parameter}"
    if "capture" in options and out.eager and bench.device.type == "cuda":
        status = f"failed: the third step was not captured: {out.eager}"
    return dict(
        error=error,
        eager_error=plain,
        allowed_error=allowed,
        status=status,
        captured=out.captured,
        why_eager=out.eager,
    )


def gate_jobs(bench: Bench) -> Iterator[Job]:
    for name, (_, autocast) in STEP_GATES.items():
        yield job(
            functools.partial(gate_step, bench, name),
            section="step",
            kind="gate",
            op="step",
            pass_=name,
            provider="triton",
            case="tiny",
            dtype="bfloat16 autocast" if autocast else "float32",
            **gate_shape(bench.tiny).shapes(),
        )


# Ways to take the step

Step = Callable[[], object]  # what it returns may know whether it was captured, and its loss


def autocast(task: LeanMAML) -> torch.autocast:
    """Inside a step, so that the copies of the weights that autocast keeps are the step's own."""
    enabled = next(task.model.parameters()).dtype == torch.float32
    return torch.autocast(device_of(task).type, torch.bfloat16, enabled=enabled)


def device_of(task: LeanMAML) -> torch.device:
    return task.batch.context_ids.device


def plain(step: Callable[[LeanMAML], object], task: LeanMAML) -> Step:
    def call() -> object:
        with autocast(task):
            return step(task)

    return call


def meta(task: LeanMAML, **options: Any) -> Step:
    return plain(lambda each: meta_step(each, backend="triton", **options), task)


def ordinary_graph(task: LeanMAML) -> Step:
    with causal_attention(task.model):
        return as_graph(plain(ordinary, task), device_of(task))


def ordinary_compiled(task: LeanMAML) -> Step:
    """By inductor on a GPU; on a CPU, which stands for one, only traced."""
    backend = "inductor" if device_of(task).type == "cuda" else "aot_eager"
    compiled = torch.compile(task.model, dynamic=False, backend=backend)
    ids = torch.cat([task.batch.context_ids, task.batch.query_ids], 1)

    def call() -> None:
        with causal_attention(task.model), autocast(task):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    return call


def sequential_graph(task: LeanMAML) -> Step:
    """The strongest sequential loop: one example's step captured once, replayed for each."""
    buffers = Episode(*(rows[0].clone() for rows in task.examples))

    def one() -> None:
        with autocast(task):
            task.loss(buffers).backward(inputs=task.trained)

    with causal_attention(task.model):
        replay = as_graph(one, device_of(task))

    def call() -> None:
        for example in task:
            for buffer, values in zip(buffers, example, strict=True):
                buffer.copy_(values)
            replay()

    return call


def with_adam(make: Callable[[LeanMAML], Step], task: LeanMAML) -> Step:
    """And an update by fused Adam, whose rate of 0 leaves the weights as they are."""
    optimizer = torch.optim.Adam(task.trained, lr=0.0, fused=True)
    step = make(task)

    def call() -> object:
        out = step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return out

    return call


@dataclass(frozen=True)
class Way:
    """A way to take the step.

    Attributes:
        make: the step on a task; what it returns may know whether it was captured.
        gates: of STEP_GATES.
        seconds: that it is timed for, at most.
        least: calls that are timed at least.
        captures: whether it is captured only after some steps.
    """

    make: Callable[[LeanMAML], Step]
    gates: tuple[str, ...] = ()
    seconds: float = 1.5
    least: int = 3
    captures: bool = False


def captured(gates: tuple[str, ...] = ("kl_autocast_captured",), **options: Any) -> Way:
    return Way(functools.partial(meta, capture="auto", **options), gates, captures=True)


def eager(*gates: str, **options: Any) -> Way:
    make = functools.partial(meta, capture="never", **options)
    return Way(make, ("kl_autocast", *gates))


MICRO: dict[str, Any] = dict(micro_groups=MICRO_GROUPS)
WAYS: dict[str, Way] = {
    "ordinary": Way(functools.partial(plain, ordinary)),
    "fast, captured": captured(),
    "fast": eager(),
    "ordinary, CUDA graph": Way(ordinary_graph),
    "ordinary, torch.compile": Way(ordinary_compiled),
    "sequential, CUDA graph": Way(sequential_graph, least=2),
    "sequential": Way(functools.partial(plain, sequential), least=1, seconds=0),
    "fast first-order, captured": captured(first_order=True),
    "fast first-order": eager("first_order", first_order=True),
    "fast, micro-groups, captured": captured(**MICRO),
    "fast, micro-groups": eager("kl_micro_groups", **MICRO),
    "fast, recompute": eager("kl_recompute", recompute="block"),
}
ADAM = "Adam, "
WAYS |= {
    ADAM + name: replace(WAYS[name], make=functools.partial(with_adam, WAYS[name].make))
    for name in ("ordinary", "fast, micro-groups, captured", "fast, micro-groups", "fast")
}
WITHOUT_ADAM = [name for name in WAYS if not name.startswith(ADAM)]
FEW = ("ordinary", "fast, captured", "fast", "sequential, CUDA graph")
# The ways of every shape that are timed, most telling first; each worker is a process.
TIMED: list[tuple[str, str, tuple[str, ...]]] = [
    ("main", MAIN, tuple(WITHOUT_ADAM[:7])),
    ("short", SHORT, (*FEW, "ordinary, CUDA graph", "sequential")),
    ("long", LONG, (*FEW, "ordinary, CUDA graph")),
    ("lora", LORA, ("ordinary", "fast, captured", "fast")),
    ("adam", MAIN, tuple(name for name in WAYS if name.startswith(ADAM))),
    ("more", MAIN, ("ordinary", *WITHOUT_ADAM[7:])),
]


_last: list[tuple[Case, LeanMAML]] = []


def task_of(shape: Case, bench: Bench) -> LeanMAML:
    """That of the job before in this process, if it is of the same shape."""
    if not _last or _last[0][0] != shape:
        _last.clear()
        dtype = torch.float32 if is_autocast(shape) else torch.bfloat16
        model = random_model(shape, bench.device, dtype)
        batch = random_batch(shape, bench.device)
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=is_autocast(shape)):
            teacher = self_teacher(model, batch)
        _last.append((shape, LeanMAML(model, batch, teacher, inner_params=shape.inner_params)))
    return _last[0][1]


def time_step(bench: Bench, shape_name: str, way_name: str) -> Row:
    way, shape = WAYS[way_name], shape_of(shape_name, bench.tiny)
    task = task_of(shape, bench)
    step = way.make(task)
    last: Any = None

    def call() -> None:
        nonlocal last
        last = step()

    if way.captures:  # what is captured is not yet at the first steps
        for _ in range(1 if bench.tiny else 3):
            call()
    present = [*model_tensors(task.model), *_tensors(task.teacher)]
    measured = measure_step(bench.device, call, present, way.seconds, way.least, most=10)
    tokens = shape.examples * shape.context_tokens, shape.examples * shape.query_tokens
    named = task.model.named_parameters()
    parameters = sum(p.numel() for name, p in named if ".lora_" not in name)
    work = step_flops(way_name.removeprefix(ADAM), parameters, *tokens, bool(shape.rank))
    loss = getattr(last, "outer_loss", None)
    return dict(
        **measured,
        captured=getattr(last, "captured", None),
        why_eager=getattr(last, "eager", None),
        last_loss=None if loss is None else float(loss),
        flops=work,
        rate=work / (1e-3 * measured["median_ms"]),
        tokens_per_s=sum(tokens) / (1e-3 * measured["median_ms"]),
        status=bench.timed_status,
    )


def _tensors(teacher: TeacherTargets | None) -> list[Tensor]:
    return [] if teacher is None or teacher.hidden is None else [teacher.hidden]


def step_jobs(bench: Bench) -> Iterator[Job]:
    for worker, shape_name, ways in TIMED:
        shape = shape_of(shape_name, bench.tiny)
        sizes = shape.shapes()
        for name in ways:
            yield job(
                functools.partial(time_step, bench, shape_name, name),
                worker,
                [("step", gate) for gate in WAYS[name].gates],
                section="step",
                kind="time",
                op="step",
                pass_="step",
                provider=name,
                case=shape_name,
                dtype="bfloat16 autocast" if is_autocast(shape) else "bfloat16",
                ceiling="matrix",
                **sizes,
            )


# What is compiled once, before anything is timed


def warm_step(bench: Bench, shape_name: str) -> Row:
    """One layer has the kernels of them all."""
    shape = shape_of(shape_name, bench.tiny)
    config = type(shape.config)(**{**shape.config.to_dict(), "num_hidden_layers": 1})
    task = task_of(replace(shape, config=config), bench)
    for options in ({}, {"first_order": True}, {"recompute": "block"}):
        meta(task, **options)()
    return {"status": "warmed"}


def warm_compile(bench: Bench, shape_name: str) -> Row:
    """Inductor keeps what it compiles on disk."""
    ordinary_compiled(task_of(shape_of(shape_name, bench.tiny), bench))()
    return {"status": "warmed"}


def warm_jobs(bench: Bench) -> Iterator[Job]:
    warm = [("ordinary, torch.compile", MAIN, warm_compile)]
    warm += [("fast", name, warm_step) for name in SHAPES]
    for provider, shape_name, run in warm:
        yield job(
            functools.partial(run, bench, shape_name),
            section="step",
            kind="warm",
            op="step",
            pass_="step",
            provider=provider,
            case=shape_name,
        )
