"""A model that FSDP2 has sharded, to be run as an ordinary one; an ordinary one is that already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from ..distributed.group import check_same, world_size
from ..distributed.sharded import PlainModel, as_plain, is_sharded
from ..errors import UserError
from ..models.architecture import compute_dtype


def is_block(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Divides a model's weights, in place, among the processes of :func:`launched`, by FSDP2's
    ``fully_shard``: every block, then the rest; a block at a time is on ``device`` as a whole.

    Raises:
        UserError: naming the process that has other weights.
    """
    sums = [parameter.detach().sum(dtype=torch.float64) for parameter in model.parameters()]
    check_same("model: the sum of its weights", float(torch.stack(sums).sum()))
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in filter(is_block, model.modules()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def opened(model: nn.Module) -> Iterator[PlainModel | None]:
    """Inside, a sharded model is an ordinary one, but for the absence of the linear layers' weights
    in blocks; None for one that is not sharded.
    """
    if not is_sharded(model):
        yield None
        return
    with as_plain(model, is_block, compute_dtype) as plain:
        yield plain


@contextmanager
def gathered(model: nn.Module) -> Iterator[PlainModel | None]:
    """Inside, a sharded model may be called, without gradients: every block gathers its weights
    while it runs. All processes have to call it as often.
    """
    with opened(model) as plain:
        if plain is None:
            yield None
            return
        with plain.gathering():
            yield plain


def check_whole(model: nn.Module, what: str) -> None:
    """
    Raises:
        UserError: for a sharded model, which ``what`` cannot do with.
    """
    if is_sharded(model):
        raise UserError(
            f"model: expected weights that are not sharded for {what}, got those of fully_shard"
        )
