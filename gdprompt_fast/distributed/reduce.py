"""Gradients summed over processes, a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .group import collective

BUCKET_BYTES = 25 * 2**20


def reduce_gradients(
    parameters: Iterable[nn.Parameter],
    group: dist.ProcessGroup | None = None,
    average: bool = False,
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Puts the sum over the processes of a group into every ``.grad``, in place.

    Call it once, after the last step on parts of a batch and before clipping and the optimizer. A
    ``.grad`` that is None counts as zeros, which it becomes: it may be there elsewhere. Gradients
    go through one flat buffer of ``bucket_bytes``; larger ones are summed in pieces where they are.

    Args:
        parameters: in the same order everywhere; those without ``requires_grad`` are left out.
        group: all processes by default.
        average: the mean over the processes instead.
    """
    gradients: list[Tensor] = []
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients += pieces_of(parameter.grad, bucket_bytes)
    scale = 1 / dist.get_world_size(group) if average else 1.0
    flat = torch.empty(0)
    for bucket in buckets(gradients, bucket_bytes):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            _sum(bucket[0], group, scale)
            continue
        size = sum(each.numel() for each in bucket)
        if (flat.dtype, flat.device) != (bucket[0].dtype, bucket[0].device) or len(flat) < size:
            flat = bucket[0].new_empty(max(size, bucket_bytes // bucket[0].element_size()))
        views = views_of(flat, bucket)
        torch._foreach_copy_(views, bucket)
        _sum(flat[:size], group, scale)
        torch._foreach_copy_(bucket, views)


def pieces_of(gradient: Tensor, most_bytes: int) -> Sequence[Tensor]:
    """The same in all processes, however the gradient lies in memory."""
    size = gradient.numel() * gradient.element_size()
    if size <= most_bytes:
        return [gradient]
    rows = max(1, most_bytes * len(gradient) // size)
    return gradient.split(rows)


def _sum(tensor: Tensor, group: dist.ProcessGroup | None, scale: float) -> None:
    with collective():
        dist.all_reduce(tensor, group=group)
    if scale != 1.0:
        tensor.mul_(scale)


def buckets(tensors: Sequence[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, together of at most so many bytes; a larger one alone."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        alike = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or filled + size > bucket_bytes):
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += size
    if bucket:
        yield bucket


def views_of(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Pieces of ``flat``, one after another, of the shapes of ``tensors``."""
    pieces = flat[: sum(each.numel() for each in tensors)].split([t.numel() for t in tensors])
    return [piece.view(each.shape) for piece, each in zip(pieces, tensors, strict=True)]
