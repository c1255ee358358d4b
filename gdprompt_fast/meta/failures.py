"""Failures of a step: what they leave behind, and how they are said."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.walk import parameters_of

_on_the_device = False


def found_at_once(device: torch.device) -> bool:
    """Whether a failure on ``device`` raises where it happens: on a CPU nothing is waited for."""
    return device.type == "cpu" and not _on_the_device


class Failures:
    """What of a step was not finite, found on its device without waiting for it.

    On a CPU nothing is waited for: there a value that is not finite raises at once, while ``.grad``
    is untouched.

    Attributes:
        errors, flags: what was looked at, and for each a bool [], up if it is an error.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._at_once = found_at_once(device)
        self.errors: list[Exception] = []
        self.flags: list[Tensor] = []

    def watch_inner_loss(
        self, loss_C: Tensor, step: int, first_group: int, group_C: Tensor
    ) -> None:
        """That the contexts' shares of their groups' inner losses at an inner step are finite."""
        if self._at_once:
            check_inner_loss(loss_C, step, first_group, group_C)
        error = f"inner loss: expected finite numbers, got others at inner step {step + 1}"
        self.add([FloatingPointError(error)], [(~torch.isfinite(loss_C)).any()])

    def take(self, flagged: list[tuple[Exception, Tensor]]) -> None:
        """What the layers of a step have noted since the last time."""
        for error, failed in flagged:
            self.add([error], [failed])
        flagged.clear()

    def add(self, errors: Sequence[Exception], flags: Sequence[Tensor]) -> None:
        """What it would mean if a flag is up."""
        self.errors += errors
        self.flags += flags
        if self._at_once:
            self.check()

    @property
    def found_inf(self) -> Tensor:
        """fp32 [], 1 if anything was not finite."""
        if not self.flags:
            return torch.zeros((), device=self.device)
        return torch.stack(self.flags).any().float()

    def check(self) -> None:
        """Waits for the flags.

        Raises:
            FloatingPointError: naming the first thing that was not finite.
            ValueError: if the model gave its rows other positions than the engine takes.
        """
        for error, up in zip(self.errors, self.flags, strict=True):
            if up:
                raise type(error)(*error.args)


class _Pending:
    """A step's flag on its way to the host."""

    def __init__(self, failures: Failures) -> None:
        self.failures = failures
        self.flag = failures.found_inf.to("cpu", non_blocking=True)
        self.arrived = _arrival(failures.device)

    def check(self, wait: bool) -> bool:
        """Whether it is here, for which it may wait; raises if it is up."""
        if self.arrived is not None and wait:
            self.arrived.synchronize()
        elif self.arrived is not None and not self.arrived.query():
            return False
        if self.flag:
            self.failures.check()
        return True


def _arrival(device: torch.device) -> torch.cuda.Event | None:
    """What has come about once a GPU has done all that it was given; a CPU has by now."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


_pending: weakref.WeakKeyDictionary[nn.Module, list[_Pending]] = weakref.WeakKeyDictionary()


def pend(model: nn.Module, failures: Failures) -> None:
    """Has a later step on the model raise what this one's values turn out to be."""
    if not found_at_once(failures.device):
        _pending.setdefault(model, []).append(_Pending(failures))


def raise_pending(model: nn.Module, together: bool = False) -> None:
    """Raises what earlier steps on the model have found, as far as that is known by now.

    Args:
        together: several processes take the steps, whose flags are the same: all raise at the same
            step, since they wait for the flags of all but the last one.
    """
    waiting = _pending.pop(model, [])
    last = len(waiting) - 1
    if together:
        rest = [each for n, each in enumerate(waiting) if n == last or not each.check(wait=True)]
    else:
        rest = [each for each in waiting if not each.check(wait=False)]
    if rest:
        _pending[model] = rest


@contextmanager
def found_on_the_device() -> Iterator[None]:
    """Inside, steps on a CPU find failures as those on a GPU do: no value is read."""
    global _on_the_device
    before, _on_the_device = _on_the_device, True
    try:
        yield
    finally:
        _on_the_device = before


@contextmanager
def clean_after_error(model: nn.Module) -> Iterator[None]:
    """A failed step leaves no ``.grad`` where there was none."""
    without_grad = [p for _, p in parameters_of(model) if p.grad is None]
    try:
        with nothing_changed_in_place():
            yield
    except BaseException:
        for parameter in without_grad:
            parameter.grad = None
        raise


@contextmanager
def nothing_changed_in_place() -> Iterator[None]:
    """A hook may change in place what the model keeps no copy of, but the engine does.

    Raises:
        UserError: where autograd found a tensor of a step changed.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"in-?place operation", str(error)):
            raise
        raise UserError(
            "model: expected modules and hooks that leave their inputs as they are, got one that "
            f"changes what a step still needs: {error}"
        ) from error


def check_inner_loss(
    loss_C: Tensor, step: int, first_group: int = 0, group_C: Tensor | None = None
) -> None:
    """A NaN or infinite inner loss would poison every meta-gradient; stop while ``.grad`` is
    untouched.

    Args:
        loss_C: a share of an inner loss each.
        group_C: the group of each, counted from ``first_group``; one each by default.
    """
    bad = ~torch.isfinite(loss_C)
    if bad.any():
        index = int(bad.nonzero()[0])
        group = first_group + (index if group_C is None else int(group_C[index]))
        raise FloatingPointError(
            f"inner loss: expected a finite number, got {float(loss_C[index])} "
            f"for group {group} at inner step {step + 1}"
        )
