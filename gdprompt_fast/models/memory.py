"""What a piece of code costs: its peak memory, counted exactly, and the end of its work."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages alive inside the ``with`` block.

    Every operator's outputs are seen as they are made and as they are freed, so the count is exact
    on a CPU, where the resident set of the process is not. It works on fake tensors too.

    Args:
        present: tensors alive before, to count as such; others are counted when an operator first
            returns a view.
        on_new: called with the first tensor of every new storage.

    Attributes:
        live_bytes: the bytes alive now.
        peak_bytes: the most that were alive at once.
    """

    def __init__(
        self, present: Iterable[Tensor] = (), on_new: Callable[[Tensor], None] | None = None
    ) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._on_new = on_new
        self._sizes: dict[int, int] = {}
        for tensor in present:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in [out] if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and self._see(leaf) and self._on_new is not None:
                self._on_new(leaf)
        return out

    def _see(self, tensor: Tensor) -> bool:
        """Counts the tensor's storage; whether it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = storage.nbytes()
        self.live_bytes += self._sizes[key]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, key)
        return True

    def _free(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was asked for, so that a clock sees it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def model_tensors(model: torch.nn.Module) -> list[Tensor]:
    """Parameters, their gradients and buffers."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.parameters(), *grads, *model.buffers()]


def peak_bytes_over_model(model: torch.nn.Module, step: Callable[[], Any]) -> int:
    """The peak of ``step()`` over the model and its gradients, which are allocated before it."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    memory = PeakMemory(model_tensors(model))
    before = memory.live_bytes
    with memory:
        step()
    return memory.peak_bytes - before
