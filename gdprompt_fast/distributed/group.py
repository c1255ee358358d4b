"""The processes that share a command's work: who this one is, and what all do together.

Outside :func:`launched` there is one process, whatever else of torch.distributed is in use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from .watch import ProcessLost, Watch, meet

T = TypeVar("T")
R = TypeVar("R")

# Of a collective; a process that ends is found much sooner, by the watch.
TIMEOUT = timedelta(hours=2)

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a launcher

_joined = False
_own_files = False
_watch: Watch | None = None


def rank() -> int:
    """The number of this process; 0 is the one that writes."""
    return dist.get_rank() if _joined else 0


def writes() -> bool:
    """Whether this process writes files: of several the first does."""
    return rank() == 0 or _own_files


@contextmanager
def writing_own_files() -> Iterator[None]:
    """Inside, every process writes files, which no other one does."""
    global _own_files
    before, _own_files = _own_files, True
    try:
        yield
    finally:
        _own_files = before


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _joined else 1


def local_rank() -> int | None:
    """The number of this process on its machine, and so of its GPU; None for a single process."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _joined else None


@contextmanager
def launched() -> Iterator[None]:
    """Inside, the processes that torchrun or accelerate has started share the work of commands,
    and end together: soon after one fails or is no longer heard of, the others exit with code 1.

    Where nothing was started there is one process, and nothing changes. A process group that is
    there already is taken.
    """
    global _joined
    if _joined or not _are_launched():
        yield
        return
    own = not dist.is_initialized()
    with _begun() if own else watched():
        _joined = True
        try:
            yield
            barrier()
        finally:
            _joined = False
    if own:
        dist.destroy_process_group()


@contextmanager
def _begun() -> Iterator[None]:
    """Inside, there is a process group, which all processes have joined."""
    store, number, size = meet()
    with _watching() as watch:  # one may be lost before the group is there
        watch.wait_for_all()
        backend = "gloo"
        if torch.cuda.is_available():
            here = int(os.environ.get("LOCAL_RANK", "0"))
            if here < torch.cuda.device_count():
                torch.cuda.set_device(here)
            backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"
        store.set_timeout(TIMEOUT)
        with collective():
            dist.init_process_group(
                backend, timeout=TIMEOUT, store=store, rank=number, world_size=size
            )
        yield


@contextmanager
def watched() -> Iterator[None]:
    """Inside, the processes of a launcher that are a process group already end together: soon after
    one fails or is no longer heard of, the others exit with code 1.
    """
    if dist.is_initialized() and _are_launched():
        with _watching():
            yield
    else:
        yield


@contextmanager
def _watching() -> Iterator[Watch]:
    """Inside, the processes end together; the watch that sees to it."""
    global _watch
    if _watch is not None:
        yield _watch
        return
    _watch = Watch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    try:
        yield _watch
    except BaseException as error:
        if not first_to_fail(error) and not isinstance(error, SystemExit):
            raise SystemExit(1) from None
        raise
    finally:
        _watch.stop()
        _watch = None


def _are_launched() -> bool:
    """Whether a launcher has started several processes."""
    return all(map(os.environ.get, _VARIABLES)) and int(os.environ["WORLD_SIZE"]) > 1


def first_to_fail(error: BaseException) -> bool:
    """Has the other processes end; whether this one is to say why, as the first to fail."""
    if _watch is None:
        return True
    if isinstance(error, ProcessLost) and _watch.others_failed():
        return False
    return _watch.failed()


@contextmanager
def collective() -> Iterator[None]:
    """Around what all processes do together.

    Raises:
        ProcessLost: where another one has gone.
    """
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(f"another process was lost: {str(error).splitlines()[0]}") from error


def barrier() -> None:
    """Waits for all processes."""
    if world_size() > 1:
        gathered(None)


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that are this process's."""
    return items if world_size() == 1 else items[rank() :: world_size()]


def shared_work(
    items: Sequence[T],
    work: Callable[[T], R],
    errors: tuple[type[Exception], ...] = (),
    together: bool = False,
) -> list[R]:
    """``[work(item) for item in items]``, each item worked on by one of the processes; all get
    all results, which are pickled.

    Args:
        together: the processes have to work as often, as where they share a model: one that has no
            item left works on the last one, for nothing.

    Raises:
        errors: in every process, what ``work`` raises of these in one.
    """
    if world_size() == 1:
        return [work(item) for item in items]
    mine = list(share(items))
    idle = -(-len(items) // world_size()) - len(mine) if together else 0
    own: list[R] | Exception
    try:
        own = [work(item) for item in mine]
        for _ in range(idle):
            work(items[-1])
    except errors as error:
        own = error
    parts = gathered(own)
    for part in parts:
        if isinstance(part, Exception):
            raise part
    return [parts[number % len(parts)][number // len(parts)] for number in range(len(items))]


def gathered(value: Any) -> list[Any]:
    """What every process has given, in their order, on all of them."""
    values = [None] * world_size()
    with collective():
        dist.all_gather_object(values, value)
    return values


def of_first(value: T) -> T:
    """What process 0 has given."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    with collective():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def check_same(name: str, value: Any) -> None:
    """That all processes have the same.

    Raises:
        UserError: naming the process that has another.
    """
    if world_size() == 1:
        return
    values = gathered(value)
    for number, other in enumerate(values):
        if other != values[0]:
            raise UserError(
                f"{name}: expected the same in all processes, {values[0]!r} in process 0, got "
                f"{other!r} in process {number}"
            )


def summed(numbers: Tensor) -> Tensor:
    """The sum over the processes; changes ``numbers``."""
    if world_size() > 1:
        with collective():
            dist.all_reduce(numbers)
    return numbers


def all_gather(into: Tensor, own: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Puts what all processes have end to end."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with collective():
        gather(into, own, group=group)


def reduce_scatter(into: Tensor, whole: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Sums over the processes, of which each gets its part of the sum."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    with collective():
        scatter(into, whole, group=group)
