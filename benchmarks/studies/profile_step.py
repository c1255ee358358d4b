"""Where the time and the bytes of a meta step go, by op.

    python -m benchmarks.studies.profile_step     # replaces results/profile.jsonl

The model is a Llama of 63 M parameters, the batch 8 x (64 + 16) tokens, on the CPU, with the ops in
PyTorch (before) and in C++ (after).
Every kernel's own time is given to the innermost of our autograd functions around it, in their
forward and backward passes, and split into matrix products and the rest. Bytes are what is
allocated in all, not what is alive at once.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import Function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from gdprompt_fast import fast_meta_step, ops
from gdprompt_fast.ops.factored import FactoredWeight

from ..harness.rows import RESULTS, replace_rows, revision
from ..report.tables import markdown
from ..step.cases import CASES, random_batch, random_model, self_teacher

BACKENDS = ("torch", "cpp")
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm_"}
PRODUCTS |= {"aten::baddbmm"}


PASSES = ("apply", "record", "add_use", "factor_cotangents")  # of a FactoredWeight


def classes() -> Iterator[tuple[str, type]]:
    """The classes in ``gdprompt_fast.ops``, with the op they are of."""
    for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        if ".cpp" not in module.name and ".eager" not in module.name:
            op = module.name.removeprefix(f"{ops.__name__}.").split(".")[0]
            for member in vars(importlib.import_module(module.name)).values():
                if isinstance(member, type) and member.__module__ == module.name:
                    yield op, member


def functions() -> dict[str, str]:
    """The op of every autograd function and :class:`FactoredWeight`, by name without "Backward"."""
    return {
        _forward_name(member.__name__): op
        for op, member in classes()
        if issubclass(member, Function) or is_factored(member)
    }


def is_factored(member: type) -> bool:
    return member is not FactoredWeight and all(hasattr(member, name) for name in PASSES)


@contextmanager
def factored_weights_seen() -> Iterator[None]:
    """Inside, the passes of what shares ``FactoredUse`` are events of its own name."""

    def seen(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with record_function(name):
                return method(*args)

        return run

    with ExitStack() as stack:
        for _, member in filter(lambda pair: is_factored(pair[1]), classes()):
            for name in PASSES:
                method = seen(member.__name__, getattr(member, name))
                stack.enter_context(patch.object(member, name, method))
        yield


def _forward_name(name: str) -> str:
    while name.endswith("Backward"):
        name = name.removesuffix("Backward")
    return name


def op_of(event: FunctionEvent, ops_by_name: dict[str, str]) -> str:
    """Our op around an event; "model" for what transformers and autograd do between them."""
    at: FunctionEvent | None = event
    while at is not None:
        name = at.name.removeprefix("autograd::engine::evaluate_function: ")
        if (op := ops_by_name.get(_forward_name(name))) is not None:
            return op
        at = at.cpu_parent
    return "model"


def measure(step: Any) -> list[dict[str, Any]]:
    step()
    activities = [ProfilerActivity.CPU]
    with factored_weights_seen(), profile(activities=activities, profile_memory=True) as profiled:
        step()
    known = functions()
    totals: dict[str, dict[str, float]] = defaultdict(lambda: dict(products=0, rest=0, bytes=0))
    for event in profiled.events():
        kind = "products" if event.name in PRODUCTS else "rest"
        total = totals[op_of(event, known)]
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
    replace_rows(RESULTS / "profile.jsonl", rows)
    lines = [
        (
            row["backend"],
            row["op"],
            f"{row['ms']:,.0f} ms, {row['share']:.1%}",
            f"{row['share_products']:.1%}",
            f"{row['allocated_bytes'] / 1e6:,.0f} MB",
        )
        for row in rows
    ]
    print(markdown(["backend", "op", "time", "of it matrix products", "allocated"], lines))


if __name__ == "__main__":
    main()
