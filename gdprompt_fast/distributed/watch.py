"""No process goes on, or waits, for long after another has failed or is gone.

Every process says now and then in the launcher's store that it is there, and listens whether the
next one still says so. A collective of a lost process may wait for minutes; this does not.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

BEAT, SILENCE = 2.0, 30.0  # seconds between signs of life, and without one until it is lost
PATIENCE = 5.0  # for another process to say why it failed


class ProcessLost(RuntimeError):
    """Another process is gone: why is for that one to say."""


class Watch:
    """This process's thread that beats, listens, and ends the process where another has failed."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._next = rank, (rank + 1) % world_size
        self._store, self._own = _connect(), _connect()  # a client waits for its calls in turn
        self._said = self._failed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def failed(self) -> bool:
        """Has the others end; whether this process was the first to fail, which is to say why."""
        if not self._failed:
            self._failed = True
            try:
                self._said = self._own.add("failures", 1) == 1
                self._own.set("failed", str(self._rank))
            except RuntimeError:  # the store went with its process, which said why
                self._said = False
        return self._said

    def others_failed(self) -> bool:
        """Whether another has failed, or does in the next seconds."""
        until = time.monotonic() + PATIENCE
        while not self._failed and time.monotonic() < until:
            try:
                if self._own.check(["failed"]):
                    return True
            except RuntimeError:
                return True
            time.sleep(0.1)
        return self._failed and not self._said

    def _run(self) -> None:
        heard, since = -1, time.monotonic()
        while not self._stop.wait(BEAT):
            try:
                self._store.add(f"beats {self._rank}", 1)
                failed = self._store.check(["failed"])
                beats = self._store.add(f"beats {self._next}", 0)
            except RuntimeError:
                _end("the process that began the others")
                return
            if failed and not self._failed:
                _end()
            now = time.monotonic()
            if beats != heard:
                heard, since = beats, now
            elif now - since > SILENCE and not self._failed:
                _end(f"process {self._next}" if self.failed() else "")


def _connect() -> Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = TCPStore(address, port, is_master=False, wait_for_workers=False)
    return PrefixStore(f"gdprompt {attempt}", store)


def _end(lost: str = "") -> None:
    if lost:
        print(f"gdprompt: stopped: {lost} was lost", file=sys.__stderr__, flush=True)
    os._exit(1)
