"""Models that FSDP2 has sharded over gloo's processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gdprompt_fast import MetaBatch
from gdprompt_fast.meta.share import share_of


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
