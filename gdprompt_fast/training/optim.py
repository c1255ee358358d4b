"""Adam's rate over a training, and its step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..distributed.group import rank, summed, world_size
from ..distributed.local_shards import LocalShards
from ..distributed.reduce import reduce_gradients
from ..distributed.shards import Shards
from ..meta.failures import found_at_once

_STATES = "exp_avg", "exp_avg_sq"


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

    Several processes sum their gradients. Sharded, each has the states of its slices of the weights
    (:class:`gdprompt_fast.distributed.shards.Shards`), steps on those, and all exchange the result.
    Of weights that are sharded themselves, whose gradients a step has summed, it steps on its own.

    Attributes:
        adam: the optimizer, of the weights or of their slices.
    """

    def __init__(
        self,
        trained: Sequence[nn.Parameter],
        clip_norm: float,
        what: str = "meta-gradient",
        sharded: bool = False,
    ) -> None:
        device = trained[0].device
        self._trained, self._clip_norm, self._what = trained, clip_norm, what
        self._at_once = found_at_once(device)
        self._shards: Shards | LocalShards | None = None
        if isinstance(trained[0], DTensor):
            self._shards = LocalShards(trained)
        elif sharded and world_size() > 1:
            self._shards = Shards(trained)
        self._stepped = trained if self._shards is None else self._shards.slices
        if self._at_once:
            self.adam = torch.optim.Adam(self._stepped)
        else:
            rate = torch.zeros((), device=device)
            self.adam = torch.optim.Adam(self._stepped, lr=rate, fused=True)
            self._failed = torch.zeros((), device=device)
        self._clear()  # what a training that diverged has left in .grad

    def update(self, rate: float, step: int, found_inf: Tensor | None = None) -> Tensor:
        """An update at ``rate`` by ``.grad``, summed over the processes, which it clips and clears;
        the norm before that, [].

        Args:
            found_inf: fp32 [], 1 where the step was not finite in another way.

        Raises:
            FloatingPointError: on a CPU, if the norm is not finite; the weights are untouched.
        """
        norm = self._clip()
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
        if self._shards is not None:
            self._shards.push()
        self._clear()
        return norm

    def _clip(self) -> Tensor:
        """Sums the gradients over the processes and clips them; their norm before, []."""
        if self._shards is not None:
            self._shards.reduce()
            gradients = [own.grad for own in self._stepped if own.grad is not None]
            of_slices = torch.nn.utils.get_total_norm(gradients)
            norm = summed(of_slices.double().square()).sqrt().to(of_slices.dtype)
            torch.nn.utils.clip_grads_with_norm_(self._stepped, self._clip_norm, norm)
            return norm
        if world_size() > 1:
            reduce_gradients(self._trained)
        return torch.nn.utils.clip_grad_norm_(self._trained, self._clip_norm)

    def _clear(self) -> None:
        for parameter in self._trained:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Adam`` on the weights has it, in however many processes. All of them
        call it; the first one gets it, the others its shapes. Of sharded weights its tensors are
        sharded as these are.
        """
        state = self.adam.state_dict()
        if self._shards is None:
            return state
        groups = [{**state["param_groups"][0], "params": list(range(len(self._trained)))}]
        whole: dict[int, dict[str, Tensor]] = {}
        if state["state"]:
            step = state["state"][0]["step"]
            whole = {number: {"step": step.clone()} for number in groups[0]["params"]}
            for name in _STATES:
                slices = [state["state"][number][name] for number in range(len(self._stepped))]
                for of_weight, tensor in zip(whole.values(), self._whole(slices), strict=True):
                    of_weight[name] = tensor
        return {"state": whole, "param_groups": groups}

    def _whole(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the weights' shapes, on the host of the first process."""
        if isinstance(self._shards, LocalShards):
            return self._shards.sharded(slices)
        device = "meta" if rank() > 0 else "cpu"
        tensors = [torch.empty_like(each, device=device).detach() for each in self._trained]
        assert self._shards is not None
        self._shards.gather(slices, tensors)
        return tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what :meth:`state_dict` gave, in however many processes, once the weights are
        back.
        """
        own, saved = self.adam.param_groups[0], state["param_groups"][0]
        # How it steps is this device's matter, and its rate every step's.
        group = saved | {name: own[name] for name in ("lr", "fused")}
        states: dict[int, dict[str, Tensor]] = state["state"]
        if self._shards is not None:
            self._shards.pull()
            group["params"] = list(range(len(self._stepped)))
            states = self._sliced(states) if states else {}
        self.adam.load_state_dict({"state": states, "param_groups": [group]})

    def _sliced(self, states: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """This process's slices of the states of the weights."""
        assert self._shards is not None
        step = states[0]["step"]
        of_slices = {number: {"step": step.clone()} for number in range(len(self._stepped))}
        for name in _STATES:
            of_weights = [states[number][name] for number in range(len(self._trained))]
            for number, each in enumerate(self._shards.slices_of(of_weights)):
                of_slices[number][name] = each
        return of_slices
