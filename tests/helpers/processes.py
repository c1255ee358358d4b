"""A few processes with gloo between them, forked from the tests' own."""

from __future__ import annotations

import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

LONGEST = 60.0  # seconds


def in_processes(count: int, work: Callable[[], Any], init: bool = True) -> list[Any]:
    """What ``work()`` returns in each of ``count`` processes, by their numbers.

    Args:
        init: the process group is there already; else only the variables of a launcher are.

    Raises:
        AssertionError: with the traceback of a process that raised or ended otherwise.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(count):
        here, there = context.Pipe(duplex=False)
        arguments = work, rank, count, store.port, init, there
        processes.append(context.Process(target=_run, args=arguments, daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        results = [_received(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    for rank, (text, _) in enumerate(results):
        assert not text, f"process {rank} of {count}:\n{text}"
    return [value for _, value in results]


def _received(pipe: Any) -> tuple[str, Any]:
    if not pipe.poll(LONGEST):
        return f"nothing after {LONGEST} s", None
    try:
        text, value = pipe.recv()
    except EOFError:
        return "ended without a result", None
    return text, torch.load(io.BytesIO(value), weights_only=False)


def _run(work: Any, rank: int, count: int, port: int, init: bool, pipe: Any) -> None:
    variables = dict(RANK=rank, WORLD_SIZE=count, LOCAL_RANK=rank, MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= dict(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    text, value = "", None
    try:
        if init:
            dist.init_process_group("gloo")
        value = work()
        if init:
            dist.barrier()
    except BaseException:
        text = traceback.format_exc()
    content = io.BytesIO()
    torch.save(value, content)
    pipe.send((text, content.getvalue()))
    pipe.close()
    os._exit(0)
