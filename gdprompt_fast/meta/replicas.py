"""A model of several processes, each with a part of a batch: in DistributedDataParallel, or sharded
by FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..batch import MetaBatch
from ..distributed.group import collective
from ..distributed.reduce import reduce_gradients
from ..distributed.sharded import PlainModel, as_plain, group_of, is_sharded
from ..distributed.watch import ProcessLost
from ..errors import UserError
from ..models.architecture import compute_dtype
from ..update.adapted_layer import Weights, always_there
from .config import MetaStepConfig, MetaStepOutput
from .failures import Failures, found_at_once, pend
from .gathered import units_of
from .lm_batch import LMBatch
from .parts import Part, padding_part

Count = int | Tensor | None


def _lost() -> ProcessLost:
    return ProcessLost("step: expected it to end in all processes, got an error in another one")


class Replicas:
    """What the processes of a model do together in a step: their batches are one batch.

    Args:
        group: the processes.
        divisor: by which gradients and losses are divided that they have summed.

    Attributes:
        sharded: the model, while :meth:`plain`, if its weights are sharded.
    """

    sharded: PlainModel | None = None

    weights: Weights = staticmethod(always_there)

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, divisor: int) -> None:
        self._model, self._group, self._divisor = model, group, divisor
        self._sums, self._finishing = 0, False  # so far

    def check(self, config: MetaStepConfig) -> None:
        """
        Raises:
            UserError: for a step that these processes cannot take together.
        """

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """What raises inside in one process does in all: its mark goes through the sums of the
        step, where the others find it.
        """
        try:
            yield
        except ProcessLost:
            raise
        except Exception:
            if not self._finishing:
                with suppress(Exception):  # of which the first one is to be told
                    self._give_up()
            raise

    def _give_up(self) -> None:
        """Takes part, with a mark, in the sums that the others wait in, as far as can be."""
        if self._sums == 0:
            self._sum(self._marked(5))

    def _marked(self, zeros: int) -> Tensor:
        device = next(self._model.parameters()).device
        return torch.tensor([0.0] * zeros + [1.0], dtype=torch.float64, device=device)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Inside, the model is an ordinary one."""
        yield

    def counts(
        self, batch: MetaBatch, lm_batch: LMBatch | None, query_count: Count, lm_count: Count
    ) -> tuple[Tensor, Tensor]:
        """The denominators to take here, so that the sum over processes, divided by the divisor, is
        the mean over all queries and rows; those given are of the batches of all processes.
        """
        real, device = batch.layout.real, batch.context_ids.device
        rows = real.contexts if lm_batch is None else lm_batch.real
        of_contexts = lm_batch is None and real.contexts > 0
        numbers = [real.queries, rows, real.groups, lm_batch is not None, of_contexts, 0.0]
        own = torch.tensor(numbers, dtype=torch.float64, device=device)
        of_all = self._sum(own.clone())
        queries, rows_of_all, self._groups = of_all[:3].clamp(min=1)
        self._check_counts(*of_all[3:])
        self._own_groups = own[2]
        whole = (
            here if given is None else given
            for here, given in ((queries, query_count), (rows_of_all, lm_count))
        )
        query, lm = (own.new_tensor(1 / self._divisor) * count for count in whole)
        return query, lm

    def _check_counts(self, given: Tensor, of_contexts: Tensor, mark: Tensor) -> None:
        """What cannot wait for the end.

        Args:
            given, of_contexts: the processes that take L_LM of an lm_batch, and of contexts.
            mark: those that have failed.
        """

    def even(self, parts: list[Part], lm_parts: list[LMBatch]) -> tuple[list[Part], list[LMBatch]]:
        """The parts of a step here, as many as the processes need them to be."""
        return parts, lm_parts

    def reduce(self) -> None:
        """Leaves the gradients of all processes in ``.grad``."""

    def finish(self, out: MetaStepOutput) -> MetaStepOutput:
        """The losses, and whether all is finite, of all processes, which leave their gradients.

        Raises:
            FloatingPointError: on a CPU, in all processes, if something in one was not finite;
                ``.grad`` holds what is of no use then.
            ProcessLost: likewise, if another one has raised something.
        """
        self._finishing = True
        self.reduce()
        losses = out.outer_loss, out.query_loss, out.lm_loss
        inner = out.inner_loss * (self._own_groups / self._groups)
        own = torch.stack([each.double() for each in (*losses, inner, out.found_inf)])
        *of_all, inner, failed, mark = self._sum(torch.cat([own, own.new_zeros(1)]))
        error = FloatingPointError("step: expected finite numbers, got others in another process")
        out.failures.add([_lost(), error], [mark > 0, failed > 0])
        if found_at_once(out.query_loss.device):
            out.failures.check()
        outer, query, lm = (each / self._divisor for each in of_all)
        dtype = out.outer_loss.dtype
        return replace(
            out,
            outer_loss=outer.to(dtype),
            query_loss=query.to(dtype),
            lm_loss=lm.to(dtype),
            inner_loss=inner.to(dtype),
        )

    def _sum(self, numbers: Tensor) -> Tensor:
        self._sums += 1
        with collective():
            dist.all_reduce(numbers, group=self._group)
        return numbers


class DDPReplicas(Replicas):
    """Of DistributedDataParallel: as that does, they average ``.grad`` at the end, so that what a
    step before has left there, which is the same in all of them, stays as it is.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        group = ddp.process_group
        super().__init__(ddp.module, group, dist.get_world_size(group))
        self._ddp = ddp

    def reduce(self) -> None:
        """Averages ``.grad``, but inside ``no_sync()``."""
        if self._ddp.require_backward_grad_sync:
            reduce_gradients(self._model.parameters(), self._group, average=True)

    def _give_up(self) -> None:
        super()._give_up()
        if self._sums == 1:
            without = [
                parameter for parameter in self._model.parameters() if parameter.grad is None
            ]
            self.reduce()
            for each in without:
                each.grad = None
            self._pend(self._sum(self._marked(5))[-1])

    def _pend(self, failed: Tensor) -> None:
        """Has the step raise that raises in the others, where they learn late of this failure.

        Args:
            failed: the number of processes that have.
        """
        if found_at_once(failed.device):
            return
        failures = Failures(failed.device)
        failures.add([_lost()], [failed < dist.get_world_size(self._group)])
        pend(self._model, failures)


class Sharded(Replicas):
    """Of FSDP2: each process has a shard of every weight, and adds the sum of all gradients to its
    shard of ``.grad``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, group_of(model), divisor=1)

    def check(self, config: MetaStepConfig) -> None:
        if config.recompute != "block":
            raise UserError(
                'recompute: expected "block" for a model whose weights are sharded, got '
                f'"{config.recompute}"'
            )

    def _check_counts(self, given: Tensor, of_contexts: Tensor, mark: Tensor) -> None:
        if mark > 0:
            raise _lost()
        if given > 0 and of_contexts > 0:
            raise UserError(
                "lm_batch: expected one in all processes of a sharded model, or none, got "
                f"{int(given)} with one and {int(of_contexts)} without"
            )

    @contextmanager
    def plain(self) -> Iterator[None]:
        with as_plain(self._model, units_of, compute_dtype) as plain:
            self.sharded, self.weights = plain, plain.present
            yield

    def even(self, parts: list[Part], lm_parts: list[LMBatch]) -> tuple[list[Part], list[LMBatch]]:
        """With parts of nothing but padding, so that all gather the weights as often."""
        device = parts[0].batch.context_ids.device
        most = torch.tensor([len(parts), len(lm_parts)], device=device)
        with collective():
            dist.all_reduce(most, dist.ReduceOp.MAX, self._group)
        number, lm_number = most.tolist()
        nothing, no_rows = padding_part(parts[0]), LMBatch.padding().to(device)
        return (
            parts + [nothing] * (number - len(parts)),
            lm_parts + [no_rows] * (lm_number - len(lm_parts)),
        )

    def reduce(self) -> None:
        assert self.sharded is not None
        self.sharded.finish()


def replicas_of(model: nn.Module) -> tuple[nn.Module, Replicas | None]:
    """The model to take a step on, and the replicas that it has in other processes, if any."""
    if isinstance(model, DistributedDataParallel):
        return model.module, DDPReplicas(model)
    return model, Sharded(model) if is_sharded(model) else None
