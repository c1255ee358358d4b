"""A few processes with gloo between them, forked from the tests' own."""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

LONGEST = 60.0  # seconds that work takes


class Ended(NamedTuple):
    """How a process ended: its exit code, what it wrote on stderr, and what its work returned."""

    code: int | None
    errors: str
    value: Any


def in_processes(
    count: int, work: Callable[[], Any], init: bool = True, longest: float = LONGEST
) -> list[Any]:
    """What ``work()`` returns in each of ``count`` processes, by their numbers.

    Args:
        init: the process group is there already; else only the variables of a launcher are.
        longest: as in :func:`ends_of`.

    Raises:
        AssertionError: with what a process that failed wrote on stderr.
    """
    ended = ends_of(count, work, init, longest)
    said = "\n".join(f"process {n} ended with {e.code}: {e.errors}" for n, e in enumerate(ended))
    assert all(each.code == 0 for each in ended), said
    return [each.value for each in ended]


def ends_of(
    count: int, work: Callable[[], Any], init: bool = False, longest: float = LONGEST
) -> list[Ended]:
    """How ``count`` processes end that do some work; those that have not after ``longest`` seconds,
    or are stopped when all others have, are killed and have None for an exit code.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    context = multiprocessing.get_context("fork")
    gc.freeze()  # their collections would touch, and so copy, all that is here
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(count):
            arguments = work, rank, count, store.port, init, f"{folder}/{rank}"
            processes.append(context.Process(target=_run, args=arguments))
            processes[-1].start()
        gc.unfreeze()
        until = time.monotonic() + longest
        while time.monotonic() < until and any(map(_runs, processes)):
            time.sleep(0.02)
        codes = []
        for process in processes:
            codes.append(process.exitcode)
            process.kill()
        return [Ended(code, *_left(f"{folder}/{rank}")) for rank, code in enumerate(codes)]


def _runs(process: Any) -> bool:
    if not process.is_alive():
        return False
    with open(f"/proc/{process.pid}/stat", encoding="utf-8") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "T"


def _left(path: str) -> tuple[str, Any]:
    value = None
    if os.path.exists(f"{path}.value"):
        value = torch.load(f"{path}.value", weights_only=False)
    with open(f"{path}.errors", encoding="utf-8") as file:
        return file.read(), value


def _run(work: Any, rank: int, count: int, port: int, init: bool, path: str) -> None:
    variables = dict(RANK=rank, WORLD_SIZE=count, LOCAL_RANK=rank, MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= dict(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    sys.stdout = io.StringIO()
    sys.stderr = sys.__stderr__ = open(f"{path}.errors", "w", encoding="utf-8", buffering=1)  # type: ignore[misc]  # noqa: SIM115
    code: Any = 0
    try:
        if init:
            dist.init_process_group("gloo")
        value = work()
        if init:
            dist.barrier()
        torch.save(value, f"{path}.value")
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)
