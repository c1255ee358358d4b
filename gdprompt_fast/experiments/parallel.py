"""The stages of experiments, done by several processes that share a device and a folder.

What they have in common, such as a task's base model, one of them does while the others wait for
it: a stage is locked while it is done.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from . import EXPERIMENTS
from .context import ExperimentContext
from .variants import Variant, train_stage

Job = tuple[Callable[..., Any], tuple[Any, ...]]


def finished_one_by_one(
    names: Sequence[str], repetitions: Sequence[ExperimentContext], jobs: int
) -> Iterator[str]:
    """Has ``jobs`` processes do the stages of these experiments: of each all that is trained, then
    all that is measured. A stage that fails is said on stderr, and left to who asks for it next.

    Args:
        names: keys of ``EXPERIMENTS``, in the order in which they are begun.
        repetitions: one for every seed.

    Yields:
        Every name, once all its stages were tried.
    """
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # the bars of several processes would overwrite one another
    try:
        context = get_context("spawn")  # a forked process could not use CUDA
        with ProcessPoolExecutor(jobs, context, _begin, (torch.get_num_threads(), jobs)) as pool:
            done: set[tuple[int, Variant]] = set()
            futures: dict[str, list[Future[Any]]] = {}
            for name in names:
                to_do = [*_trainings(name, repetitions, done), *_measurements(name, repetitions)]
                futures[name] = [pool.submit(_do, *job) for job in to_do]
            while futures:
                left = [each for its in futures.values() for each in its if not each.done()]
                wait(left, return_when=FIRST_COMPLETED)
                for name in [each for each, its in futures.items() if _all_done(its)]:
                    errors = [future.exception() for future in futures.pop(name)]
                    for error in filter(None, errors):
                        print(f"warning: {name}: a stage failed: {error!r}", file=sys.stderr)
                    yield name
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def _all_done(futures: Sequence[Future[Any]]) -> bool:
    return all(future.done() for future in futures)


def _do(work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    """A job; what memory it took of a GPU is then free for other processes."""
    try:
        work(*given)
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _begin(threads: int, jobs: int) -> None:
    """What a process does first: it takes its share of the threads."""
    torch.set_num_threads(max(1, threads // jobs))


def _trainings(
    name: str, repetitions: Sequence[ExperimentContext], done: set[tuple[int, Variant]]
) -> Iterator[Job]:
    """Every variant of every seed that is not ``done``, to which it is added; tasks in turns, so
    that few processes wait for the same base model.
    """
    by_task: dict[tuple[str, int], list[Job]] = {}
    for ctx in _of(name, repetitions):
        options: Any = ctx.preset.section(name, EXPERIMENTS[name].options)
        for variant in EXPERIMENTS[name].variants(ctx.preset, options):
            if (ctx.seed, variant) not in done:
                done.add((ctx.seed, variant))
                its = by_task.setdefault((variant.task, ctx.seed), [])
                its.append((train_stage, (ctx, variant)))
    while any(by_task.values()):
        yield from [jobs.pop(0) for jobs in by_task.values() if jobs]


def _measurements(name: str, repetitions: Sequence[ExperimentContext]) -> Iterator[Job]:
    """The experiment, a seed and where it has several tasks one of them at a time."""
    for ctx in _of(name, repetitions):
        options: Any = ctx.preset.section(name, EXPERIMENTS[name].options)
        for task in getattr(options, "tasks", [None]):
            part = options if task is None else replace(options, tasks=(task,))
            yield _measure, (name, ctx, part)


def _of(name: str, repetitions: Sequence[ExperimentContext]) -> list[ExperimentContext]:
    seeds = repetitions[0].preset.seeds_of(name)
    return [ctx for ctx in repetitions if ctx.seed in seeds]


def _measure(name: str, ctx: ExperimentContext, options: Any) -> None:
    """An experiment for what its stages leave."""
    EXPERIMENTS[name].run([ctx], options)
