"""Adam's rate over a training, and its step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..distributed.group import world_size
from ..distributed.reduce import reduce_gradients
from ..meta.failures import found_at_once


def warmup_then_cosine(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Adam's rate at ``step``, counted from 0: a linear warm-up, then a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def check_norm(norm: float, step: int, what: str = "meta-gradient") -> None:
    """
    Raises:
        FloatingPointError: if the norm of a gradient is not finite, naming ``what``.
    """
    if not math.isfinite(norm):
        raise FloatingPointError(f"{what}: its norm is {norm} at step {step}")


class ClippedAdam:
    """Adam on clipped gradients, whose weights no step that is not finite ever touches.

    On a GPU it is fused, with its rate on the device, and waits for nothing: from a step that is
    not finite on it updates nothing, until somebody has read that.

    Attributes:
        adam: the optimizer, for checkpoints.
    """

    def __init__(
        self, trained: Sequence[nn.Parameter], clip_norm: float, what: str = "meta-gradient"
    ) -> None:
        device = trained[0].device
        self._trained, self._clip_norm, self._what = trained, clip_norm, what
        self._at_once = found_at_once(device)
        if self._at_once:
            self.adam = torch.optim.Adam(trained)
        else:
            self.adam = torch.optim.Adam(trained, lr=torch.zeros((), device=device), fused=True)
            self._failed = torch.zeros((), device=device)
        self.adam.zero_grad()  # what a training that diverged has left in .grad

    def update(self, rate: float, step: int, found_inf: Tensor | None = None) -> Tensor:
        """An update at ``rate`` by ``.grad``, summed over the processes, which it clips and clears;
        the norm before that, [].

        Args:
            found_inf: fp32 [], 1 where the step was not finite in another way.

        Raises:
            FloatingPointError: on a CPU, if the norm is not finite; the weights are untouched.
        """
        if world_size() > 1:
            reduce_gradients(self._trained)
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._clip_norm)
        if self._at_once:
            check_norm(float(norm), step, self._what)
        else:
            failed = (~norm.isfinite()).float()
            for found in (failed, found_inf):
                if found is not None:
                    self._failed = torch.maximum(self._failed, found)
            self.adam.found_inf = self._failed  # type: ignore[attr-defined]
        for group in self.adam.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        return norm
