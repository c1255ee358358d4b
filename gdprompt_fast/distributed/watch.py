"""No process goes on, or waits, for long after another has failed or is gone.

Every process says now and then in the launcher's store that it is there, and listens whether the
next one still says so, and the store still answers. A collective of a lost process may wait for
hours; this does not.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]

JOINING = 300.0  # seconds that processes wait until all have come
BEAT, SILENCE = 2.0, 45.0  # seconds between signs of life, and without one until it is lost
PATIENCE = 5.0  # for another process to say why it failed

_STORE = "the process that began the others"


class ProcessLost(RuntimeError):
    """Another process is gone: why is for that one to say."""


def meet() -> tuple[Store, int, int]:
    """The launcher's store, this process's number and how many there are.

    Raises:
        SystemExit: after ``JOINING`` seconds without it, having said so.
    """
    try:
        return next(rendezvous("env://", timeout=timedelta(seconds=JOINING)))
    except RuntimeError:
        _say(f"not all processes have met at {os.environ['MASTER_ADDR']} within {JOINING:g} s")
        raise SystemExit(1) from None


class Watch:
    """This process's threads that beat, listen, and end the process where another has failed.

    All processes begin them equally often, if not at the same time: who has not begun is not lost.
    """

    _begun = 0

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._size, self._next = rank, world_size, (rank + 1) % world_size
        Watch._begun += 1
        # A client waits for its calls in turn.
        self._store, self._own = _connect(Watch._begun), _connect(Watch._begun)
        self._store.add(f"beats {rank}", 1)
        self._said = self._failed = False
        self._answers = 0  # of the store
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="beat", daemon=True)
        self._beating.start()
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    def wait_for_all(self) -> None:
        """Until all have begun.

        Raises:
            SystemExit: if some have not after ``JOINING`` seconds; one of the others says so.
        """
        names = [f"here {each}" for each in range(self._size)]
        self._own.set(names[self._rank], "")
        try:
            self._own.wait(names, timedelta(seconds=JOINING))
        except RuntimeError:
            if self.failed():
                _say(f"{self._missing(names)} has not come within {JOINING:g} s")
            raise SystemExit(1) from None

    def _missing(self, names: Sequence[str]) -> str:
        try:
            there = [self._own.check([name]) for name in names]
        except RuntimeError:
            return _STORE
        return "process " + ", ".join(str(n) for n, here in enumerate(there) if not here)

    def stop(self) -> None:
        """Ends the watch; where the store goes with this process, no sooner than all others, but
        those that are lost, have ended theirs.
        """
        self._stop.set()
        self._beating.join()
        try:
            self._own.set(f"ended {self._rank}", "")
            if self._has_store:
                self._wait_for_others()
        except RuntimeError:  # it is gone
            pass

    def _wait_for_others(self) -> None:
        silence = {each: _Silence() for each in range(self._size) if each != self._rank}
        while silence:
            failed = self._own.check(["failed"])
            longest = timedelta(seconds=PATIENCE if failed else BEAT)
            with suppress(RuntimeError):  # some have not after so long
                self._own.wait([f"ended {each}" for each in silence], longest)
            if failed:
                return
            silence = {
                each: looks
                for each, looks in silence.items()
                if not self._has_ended(each, self._own)
                and not looks.is_long(self._own.add(f"beats {each}", 0))
            }

    @staticmethod
    def _has_ended(rank: int, store: Store) -> bool:
        ended: bool = store.check([f"ended {rank}"])
        return ended

    @property
    def _has_store(self) -> bool:
        return self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def failed(self) -> bool:
        """Has the others end; whether this process was the first to fail, which is to say why."""
        if not self._failed:
            self._failed = True
            try:
                self._said = self._own.add("failures", 1) == 1
                self._own.set("failed", str(self._rank))
            except RuntimeError:  # the store was lost, and with it who was first
                self._said = True
        return self._said

    def others_failed(self) -> bool:
        """Whether another has failed, or does in the next seconds."""
        until = time.monotonic() + PATIENCE
        while not self._failed and time.monotonic() < until:
            try:
                if self._own.check(["failed"]):
                    return True
            except RuntimeError:
                return False
            time.sleep(0.1)
        return self._failed and not self._said

    def _beat(self) -> None:
        silence = _Silence()
        while not self._stop.wait(BEAT):
            try:
                self._store.add(f"beats {self._rank}", 1)
                failed = self._store.check(["failed"])
                beats = self._store.add(f"beats {self._next}", 0)
                silent = beats > 0 and silence.is_long(beats)
                ended = silent and self._has_ended(self._next, self._store)
            except RuntimeError:
                _end(_STORE)
            self._answers += 1
            if failed and not self._failed:
                _end()
            if ended:  # from here on the one after that is listened to
                self._next, silence = (self._next + 1) % self._size, _Silence()
            elif silent and not self._failed:
                _end(f"process {self._next}" if self.failed() else "")

    def _listen(self) -> None:
        """Whether the store still answers: a call of one whose machine has vanished never ends."""
        silence = _Silence()
        while self._beating.is_alive():
            self._beating.join(BEAT)
            if silence.is_long(self._answers):
                _end(_STORE)


class _Silence:
    """How often in turn a number was found not to have grown: a process that was stopped itself, or
    had no time to look, blames no other.
    """

    def __init__(self) -> None:
        self._number, self._looks = -1, 0

    def is_long(self, number: int) -> bool:
        """Takes another look."""
        self._looks = self._looks + 1 if number == self._number else 0
        self._number = number
        return self._looks * BEAT > SILENCE


def _connect(number: int) -> Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = TCPStore(address, port, is_master=False, wait_for_workers=False)
    return PrefixStore(f"gdprompt {attempt} {number}", store)


def _end(lost: str = "") -> None:
    if lost:
        _say(f"{lost} was lost")
    os._exit(1)


def _say(what: str) -> None:
    print(f"gdprompt: stopped: {what}", file=sys.__stderr__, flush=True)
