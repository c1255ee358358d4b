"""One supervisor: functions run in processes of their own, so that what ends one is a row.

Running out of memory or of time, an error and a crash all become a ``status``, never a missing row.
"""

from __future__ import annotations

import gc
import multiprocessing
import queue
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from .rows import Row

Work = Callable[..., Row]
START_LIMIT_S = 300
Item = TypeVar("Item")
PRELOADED = ["transformers.models.llama.modeling_llama", "peft", "gdprompt_fast"]


def is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error) or "bad_alloc" in str(error)


def start_method(device: str) -> Any:
    """Forks of a server that has imported everything; CUDA does not survive a fork."""
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Worker:
    """A process that runs one function after another, replaced by a new one where a call ends it.

    Args:
        context: of multiprocessing, see :func:`start_method`.
        memory_limit_bytes: of the process's data; 0 for none.
        prepare: called first in every process.
    """

    def __init__(
        self,
        context: Any,
        memory_limit_bytes: int = 0,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._context = context
        self._arguments = memory_limit_bytes, prepare
        self._process: Any = None
        self._connection: Connection | None = None
        self._ready = False

    def run(self, limit_s: float, function: Work, *arguments: Any) -> Row:
        """What the function returns, or a status that says why it does not."""
        connection = self.start()
        try:
            if not self._ready:
                self._ready = connection.poll(START_LIMIT_S) and connection.recv()
            connection.send((function, arguments))
            if not self._ready or not connection.poll(limit_s):
                self.close()
                return {"status": f"out of time: more than {limit_s:.0f} s"}
            row, usable = connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            exit_status = self._process.exitcode
            self.close()
            return {"status": f"crashed: exit status {exit_status}"}
        if not usable:
            self.close()
        return row

    def start(self) -> Connection:
        """The process, on its way to being ready; a call is served when it is."""
        if self._connection is not None:
            return self._connection
        ours, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_serve, args=(theirs, *self._arguments), daemon=True
        )
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._connection = ours
        return ours

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None
        self._ready = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _serve(
    connection: Connection, memory_limit_bytes: int, prepare: Callable[[], None] | None
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its child itself
    if memory_limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit_bytes, memory_limit_bytes))
    if prepare is not None:
        prepare()
    connection.send(True)  # ready: what a call may take counts from here
    gc.freeze()  # a collection need not look at the libraries again
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        row = _outcome(function, arguments)
        gc.collect()  # what a call has left in the reference cycles of autograd
        connection.send((row, _is_usable()))


def _outcome(function: Work, arguments: tuple[Any, ...]) -> Row:
    try:
        return function(*arguments)
    except Exception as error:
        if is_out_of_memory(error):
            return {"status": "out of memory"}
        traceback.print_exc(file=sys.stderr)
        return {"status": f"error: {type(error).__name__}: {error}"[:600]}


def _is_usable() -> bool:
    """Whether anything runs on the GPU any more in this process."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception:
        return False
    return True


class Pool(Generic[Item]):
    """As many workers as given, each on the next item that is left."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers

    def outcomes(
        self, items: Iterable[Item], run: Callable[[Worker, Item], Row]
    ) -> Iterator[tuple[Item, Row]]:
        """Every item with what ``run(worker, item)`` returned, in the order they come to an end."""
        left: queue.SimpleQueue[Item] = queue.SimpleQueue()
        count = 0
        for item in items:
            left.put(item)
            count += 1
        done: queue.SimpleQueue[tuple[Item, Row]] = queue.SimpleQueue()

        def drain(worker: Worker) -> None:
            with worker:
                while True:
                    try:
                        item = left.get_nowait()
                    except queue.Empty:
                        return
                    done.put((item, run(worker, item)))

        for worker in self._workers[:count]:
            threading.Thread(target=drain, args=(worker,), daemon=True).start()
        for _ in range(count):
            yield done.get()
