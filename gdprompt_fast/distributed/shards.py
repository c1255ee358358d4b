"""Parameters in equal flat slices, one a process: what an optimizer that is sharded steps on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .group import all_gather, reduce_scatter
from .reduce import BUCKET_BYTES, buckets, pieces_of, views_of


class Shards:
    """Every bucket of the parameters, end to end and padded, is cut into one slice a process.

    Attributes:
        slices: this process's, a copy of its part of the parameters for each bucket; their
            ``.grad`` is filled by :meth:`reduce`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_bytes: int = BUCKET_BYTES):
        self._parameters, self._bytes = parameters, bucket_bytes
        self._size, self._rank = dist.get_world_size(), dist.get_rank()
        self.slices = [
            nn.Parameter(bucket[0].new_empty(-(-_numel(bucket) // self._size)))
            for bucket in self._buckets(parameters)
        ]
        for own in self.slices:
            own.grad = torch.empty_like(own)
        self.pull()

    def pull(self) -> None:
        """Takes the slices from the parameters."""
        self._take(self._parameters, [own.data for own in self.slices])

    def reduce(self) -> None:
        """Puts the sums over the processes of the parameters' ``.grad`` into that of the slices;
        None counts as zeros.
        """
        gradients = [_gradient(parameter) for parameter in self._parameters]
        for bucket, own in zip(self._buckets(gradients), self.slices, strict=True):
            assert own.grad is not None
            flat = self._flat(bucket)
            reduce_scatter(own.grad, flat)

    def push(self) -> None:
        """Puts the slices of all processes into the parameters."""
        self.gather([own.data for own in self.slices], self._parameters)

    def gather(self, slices: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """Puts what all processes have for their slices into tensors of the parameters' shapes, but
        for those on the meta device.
        """
        for bucket, own in zip(self._buckets(into), slices, strict=True):
            flat = own.new_empty(len(own) * self._size)
            all_gather(flat, own)
            if not bucket[0].is_meta:
                torch._foreach_copy_(bucket, views_of(flat, bucket))

    def slices_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This process's slices of tensors of the parameters' shapes."""
        taken = [torch.empty_like(own.data) for own in self.slices]
        self._take(tensors, taken)
        return taken

    def _take(self, tensors: Sequence[Tensor], slices: Sequence[Tensor]) -> None:
        for bucket, own in zip(self._buckets(tensors), slices, strict=True):
            own.copy_(self._flat(bucket).view(self._size, -1)[self._rank])

    def _buckets(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Of tensors of the parameters' shapes and dtypes, the same for all of them."""
        pieces = [piece for each in tensors for piece in pieces_of(each.detach(), self._bytes)]
        return buckets(pieces, self._bytes)

    def _flat(self, bucket: list[Tensor]) -> Tensor:
        flat = bucket[0].new_zeros(-(-_numel(bucket) // self._size) * self._size)
        torch._foreach_copy_(views_of(flat, bucket), bucket)
        return flat


def _numel(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
