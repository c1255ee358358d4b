"""A stand-in for a CUDA graph that runs on a CPU: every op of a piece of work, run again on the
same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Ops that give the host a number, or tensors whose sizes hang on values.
READS = {"_local_scalar_dense", "is_nonzero", "equal", "item"}
SHAPES_FROM_VALUES = {
    "nonzero",
    "masked_select",
    "bincount",
    "unique",
    "_unique",
    "_unique2",
    "unique_dim",
}


class NoReads(TorchDispatchMode):
    """Fails on an op that waits for a value of a tensor, and on indexing by a mask."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        indices = tree_leaves([arg for arg in args if isinstance(arg, list | tuple)])
        mask = name.startswith(("index", "_index")) and any(
            isinstance(each, Tensor) and each.dtype == torch.bool for each in indices
        )
        repeats = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        assert name not in READS | SHAPES_FROM_VALUES and not mask and not repeats, (
            f"{op} reads values back"
        )
        return op(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Has the interface of ``meta.capture.Graph``: records ops with their very tensors.

    As with a graph, nothing has happened to memory from outside after the recording.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def record(self, work: Callable[[], None]) -> None:
        with self, NoReads():
            work()
        for tensor, value in self._before.values():
            with torch.no_grad():
                tensor.copy_(value)
        self._before.clear()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves(args[:1]):  # where an op writes, but for out=
            if isinstance(tensor, Tensor) and op._schema.is_mutable:
                self._remember(tensor)
        out = op(*args, **(kwargs or {}))
        self.ops.append((op, args, kwargs or {}, out))
        given = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = {_memory(t) for t in tree_leaves(out) if isinstance(t, Tensor)}
        self._made |= made - given
        return out

    def _remember(self, tensor: Tensor) -> None:
        memory = _memory(tensor)
        if memory not in self._made and memory not in self._before:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self._before[memory] = whole, whole.clone()

    @torch.no_grad()
    def replay(self) -> None:
        for op, args, kwargs, out in self.ops:
            again = op(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and new is not old:
                    _write(old, new)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _write(old: Tensor, new: Tensor) -> None:
    """What an op gives again, to where it gave it at first."""
    if old.data_ptr() != new.data_ptr() or old.shape != new.shape:
        old.detach().copy_(new)


def on_tapes(change: Callable[[str, Any], None]) -> None:
    """Has the steps of a CPU captured on tapes; ``change(name, value)`` sets an attribute."""
    change("gdprompt_fast.meta.capture.CAPTURING", ("cpu",))
    change("gdprompt_fast.meta.capture.Graphs.new_graph", lambda _: Tape())
