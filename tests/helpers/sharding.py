"""Models that FSDP2 has sharded over gloo's processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gdprompt_fast import MetaBatch
from gdprompt_fast.distributed.sharded import StandIn
from gdprompt_fast.meta.share import share_of
from gdprompt_fast.models.memory import PeakMemory, model_tensors


def shard(model: Any) -> Any:
    """As FSDP2's users do: the blocks, and then the model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    blocks = base.transformer.h if hasattr(base, "transformer") else base.model.layers
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full_gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if isinstance(parameter.grad, DTensor)
    }


def own_part(batch: MetaBatch, **given: Any) -> dict[str, Any]:
    """Without the whole's denominators, which a step on a sharded model finds."""
    part = share_of(batch, dist.get_rank(), dist.get_world_size(), **given)
    del part["query_count"], part["lm_count"]
    return part


class PeakWithStandIns(PeakMemory):
    """Counts the memory of stand-ins as it comes and goes, which no operator shows."""

    def __enter__(self) -> Any:
        self._own = StandIn.fill, StandIn.free
        fill, free = self._own

        def counted(change: Any, stand_in: StandIn) -> None:
            storage = stand_in.data.untyped_storage()
            before = storage.nbytes()
            change(stand_in)
            more = storage.nbytes() - before
            if storage._cdata in self._sizes and more:
                self._sizes[storage._cdata] += more
                self.live_bytes += more
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)

        StandIn.fill = lambda each: counted(fill, each)  # type: ignore[assignment]
        StandIn.free = lambda each: counted(free, each)  # type: ignore[assignment]
        return super().__enter__()

    def _see(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, DTensor) and super()._see(tensor)  # has only a shard

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        StandIn.fill, StandIn.free = self._own  # type: ignore[method-assign]


def peak_of(model: Any, step: Callable[[], Any]) -> int:
    """Over the model, or its shards, and their gradients; but for what gloo makes."""
    step()
    own = [t.to_local() if isinstance(t, DTensor) else t for t in model_tensors(model)]
    memory = PeakWithStandIns(own)
    before = memory.live_bytes
    with memory:
        step()
    return memory.peak_bytes - before
