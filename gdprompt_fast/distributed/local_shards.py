"""The shards of a model that FSDP2 has sharded: what an optimizer steps on, and files hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


class LocalShards:
    """This process's rows of every parameter, in the memory that they have in the model.

    Attributes:
        slices: those; their ``.grad`` is filled by :meth:`reduce`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self.slices = [nn.Parameter(local_of(parameter)) for parameter in parameters]

    def pull(self) -> None:
        """The slices are the parameters."""

    def reduce(self) -> None:
        """Puts the parameters' ``.grad``, which a step has summed over the processes, into that of
        the slices; None counts as zeros.
        """
        for parameter, own in zip(self._parameters, self.slices, strict=True):
            gradient = parameter.grad
            own.grad = torch.zeros_like(own) if gradient is None else local_of(gradient)

    def push(self) -> None:
        """The parameters are stepped on already; the gradients are not needed any more."""
        for own in self.slices:
            own.grad = None

    def slices_of(self, tensors: Sequence[Any]) -> list[Tensor]:
        """This process's slices of tensors of the parameters' shapes, or of safetensors' slices of
        files.
        """
        return [
            each[rows_of(parameter)].to(own.device, copy=True)
            for each, parameter, own in zip(tensors, self._parameters, self.slices, strict=True)
        ]

    def sharded(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """What all processes have for their slices, as tensors sharded as the parameters are."""
        return [
            like_of(parameter, own) for parameter, own in zip(self._parameters, slices, strict=True)
        ]


def local_of(sharded: Any) -> Tensor:
    """This process's part, in its own memory: writing to it counts as writing to the whole."""
    assert isinstance(sharded, DTensor)
    return sharded._local_tensor.detach()


def like_of(parameter: Any, own: Tensor) -> Tensor:
    """Parts that are sharded as a parameter is."""
    options = dict(shape=parameter.shape, stride=parameter.stride(), run_check=False)
    made: Tensor = DTensor.from_local(own, parameter.device_mesh, [Shard(0)], **options)
    return made


@torch.no_grad()
def put_rows(tensor: Any, into: Any) -> None:
    """Puts a whole tensor, or a safetensors' slice of a file, into a sharded one."""
    if isinstance(into, DTensor):
        local_of(into).copy_(tensor[rows_of(into)])
    else:
        into.copy_(tensor[:])


def rows_of(sharded: Any) -> slice:
    """The rows of a whole tensor that this process has: an equal number in all of them, of the
    first ones what the last ones lack.
    """
    mesh = sharded.device_mesh
    each = -(-len(sharded) // mesh.size())
    start = min(mesh.get_local_rank() * each, len(sharded))
    return slice(start, start + len(local_of(sharded)))
