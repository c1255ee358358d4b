"""A model that DistributedDataParallel wraps: the batches of all processes are one batch."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..batch import MetaBatch
from ..distributed.group import collective
from ..distributed.reduce import reduce_gradients
from .config import MetaStepOutput
from .failures import found_at_once
from .lm_batch import LMBatch

Count = int | Tensor | None


def unwrapped(model: nn.Module) -> tuple[nn.Module, Replicas | None]:
    """The model in DistributedDataParallel, and its replicas; None for a model without it."""
    if isinstance(model, DistributedDataParallel):
        return model.module, Replicas(model)
    return model, None


class Replicas:
    """What the processes of a DistributedDataParallel model do together in a step.

    As that does, they average ``.grad`` at the end, so what a step before has left there, which is
    the same in all of them, stays as it is; a process's denominators are a share of all of them's.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp, self._group = ddp, ddp.process_group
        self._size = dist.get_world_size(self._group)

    def counts(
        self, batch: MetaBatch, lm_batch: LMBatch | None, query_count: Count, lm_count: Count
    ) -> tuple[Tensor, Tensor]:
        """The denominators to take here, so that the mean over processes is that of all queries
        and rows; those given are of the batches of all processes together.
        """
        real, device = batch.layout.real, batch.context_ids.device
        rows = real.contexts if lm_batch is None else lm_batch.real
        own = torch.tensor([real.queries, rows, real.groups], dtype=torch.float64, device=device)
        queries, rows_of_all, self._groups = self._sum(own.clone()).clamp(min=1)
        self._own_groups = own[2]
        whole = (
            here if given is None else given
            for here, given in ((queries, query_count), (rows_of_all, lm_count))
        )
        query, lm = (own.new_tensor(1 / self._size) * count for count in whole)
        return query, lm

    def finish(self, out: MetaStepOutput) -> MetaStepOutput:
        """Averages ``.grad``, but inside ``no_sync()``; the losses, and whether all is finite, of
        all processes.

        Raises:
            FloatingPointError: on a CPU, in all processes, if something in one was not finite;
                ``.grad`` holds what is of no use then.
        """
        if self._ddp.require_backward_grad_sync:
            reduce_gradients(self._ddp.module.parameters(), self._group, average=True)
        losses = out.outer_loss, out.query_loss, out.lm_loss
        inner = out.inner_loss * (self._own_groups / self._groups)
        own = torch.stack([each.double() for each in (*losses, inner, out.found_inf)])
        *of_all, inner, failed = self._sum(own)
        error = FloatingPointError("step: expected finite numbers, got others in another process")
        out.failures.add([error], [failed > 0])
        if found_at_once(out.query_loss.device):
            out.failures.check()
        outer, query, lm = (each / self._size for each in of_all)
        dtype = out.outer_loss.dtype
        return replace(
            out,
            outer_loss=outer.to(dtype),
            query_loss=query.to(dtype),
            lm_loss=lm.to(dtype),
            inner_loss=inner.to(dtype),
        )

    def _sum(self, numbers: Tensor) -> Tensor:
        with collective():
            dist.all_reduce(numbers, group=self._group)
        return numbers
