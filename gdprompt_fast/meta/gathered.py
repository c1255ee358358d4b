"""A model that FSDP2 has sharded, to be run as an ordinary one; an ordinary one is that already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from ..distributed.alike import check_same_weights
from ..distributed.group import world_size
from ..distributed.sharded import PlainModel, as_plain, is_sharded
from ..errors import UserError
from ..models.architecture import causal_lm, compute_dtype
from ..models.intact import has_own_forward


def units_of(model: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """What of a model is gathered for its own passes: by block the weights of linear layers, and
    those of the head and of embeddings, one of which a tied embedding shares with the head.
    """
    units: dict[nn.Module, list[nn.Parameter]] = {}
    for block in filter(is_block, model.modules()):
        linear = (module for name, module in block.named_modules() if _is_gathered(name, module))
        units[block] = [layer.weight for layer in linear]
    lm: Any = causal_lm(model)
    tables = [module for module in model.modules() if type(module) is nn.Embedding]
    # What runs in the place of an own forward expects the weight to be there.
    read_otherwise = {id(table.weight) for table in tables if not has_own_forward(table)}
    for module in (*tables, lm.get_output_embeddings()):
        if type(module) in (nn.Embedding, nn.Linear) and id(module.weight) not in read_otherwise:
            units[module] = [module.weight]
    return units


def _is_gathered(name: str, module: Any) -> bool:
    linear = type(module) is nn.Linear or type(module).__qualname__ == "Conv1D"
    return linear and ".lora_" not in name


def is_block(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Divides a model's weights, in place, among the processes of :func:`launched`, by FSDP2's
    ``fully_shard``: every block, then the rest; a block at a time is on ``device`` as a whole.

    Raises:
        UserError: naming the process that has other weights.
    """
    check_same_weights("model", model)
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in filter(is_block, model.modules()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def opened(model: nn.Module) -> Iterator[PlainModel | None]:
    """Inside, a sharded model is an ordinary one, but for the absence of the weights of
    :func:`units_of`; None for one that is not sharded.
    """
    if not is_sharded(model):
        yield None
        return
    with as_plain(model, units_of, compute_dtype) as plain:
        yield plain


@contextmanager
def gathered(model: nn.Module, head: bool = True) -> Iterator[PlainModel | None]:
    """Inside, a sharded model may be called, without gradients: every block gathers its weights
    while it runs. All processes have to call it as often.

    Args:
        head: false for its final states alone.
    """
    with opened(model) as plain:
        if plain is None:
            yield None
            return
        but = [] if head else [causal_lm(model).get_output_embeddings()]
        with plain.gathering(but):
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
