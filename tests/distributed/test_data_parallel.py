"""N processes with a part of a batch each give what one gives with all of it, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gdprompt_fast import LMBatch, MetaBatch, TeacherTargets, fast_meta_step
from gdprompt_fast.distributed.reduce import reduce_gradients
from gdprompt_fast.distributed.watch import ProcessLost
from gdprompt_fast.errors import UserError
from gdprompt_fast.meta import failures, verify
from gdprompt_fast.meta.failures import found_on_the_device
from gdprompt_fast.meta.share import share_of
from gdprompt_fast.models.memory import PeakMemory, model_tensors
from gdprompt_fast.reference.compare import gradients_of, worst_error
from helpers.models import random_teacher
from helpers.processes import in_processes
from helpers.sharding import shard

Build = Callable[..., Any]
PROCESSES = pytest.mark.parametrize("count", [2, 3])


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def lm_rows(batch: MetaBatch, rows: int) -> LMBatch:
    return LMBatch(batch.context_ids[:rows], batch.context_mask[:rows])


def in_shares(
    model: torch.nn.Module, batch: MetaBatch, given: dict[str, Any], **options: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients of a step of all processes."""
    own = share_of(batch, dist.get_rank(), dist.get_world_size(), **given)
    model.zero_grad()
    out = fast_meta_step(model, own.pop("batch"), **own, **options)
    reduce_gradients(model.parameters())
    losses = torch.stack([out.outer_loss, out.query_loss, out.lm_loss])
    dist.all_reduce(losses)
    names = ("outer_loss", "query_loss", "lm_loss")
    return dict(zip(names, losses, strict=True)), gradients(model)


@pytest.mark.quick
@PROCESSES
def test_processes_give_what_one_gives(count: int, tiny_model: Build, make_batch: Build) -> None:
    """Ragged parts; λ on contexts and other rows; rates by group; micro-groups; fewer groups than
    processes, and groups without a query.
    """
    model = tiny_model()
    cases: list[tuple[MetaBatch, dict[str, Any], dict[str, Any]]] = []
    for kind in ("one-each", "grouped", "uneven"):
        batch = make_batch(kind)
        rates = torch.linspace(0.05, 0.1, batch.groups, dtype=torch.float64)
        kl = dict(teacher=random_teacher(batch), inner_lr=rates)
        cases += [
            (batch, kl, dict(lm_weight=0.5)),
            (batch, dict(lm_batch=lm_rows(batch, 2)), dict(objective="gold", lm_weight=0.5)),
            (batch, dict(inner_lr=0.1), dict(objective="gold", micro_groups=1, recompute="block")),
        ]
    cases.append((make_batch("one-each").select([1])[0], {}, dict(objective="gold", lm_weight=1.0)))

    expected = [
        gradients_of(fast_meta_step, model, batch, **given, **options)
        for batch, given, options in cases
    ]

    def work() -> Any:
        return [in_shares(model, batch, given, **options) for batch, given, options in cases]

    for of_process in in_processes(count, work):
        for (losses, got), (out, wanted) in zip(of_process, expected, strict=True):
            assert worst_error(got, wanted)[0] < 1e-9
            for name, loss in losses.items():
                torch.testing.assert_close(loss, getattr(out, name))


@PROCESSES
def test_a_ddp_model_takes_the_batches_of_all_processes_as_one(
    count: int, tiny_model: Build, make_batch: Build
) -> None:
    """Ragged, with a process that has nothing; accumulated, inside ``no_sync`` and without it."""
    batch, options = make_batch("grouped"), dict(inner_lr=0.1, objective="gold", lm_weight=0.5)
    parts = [batch.select([0, 2])[0], batch.select([1])[0], MetaBatch.padding()][:count]
    model = tiny_model()
    whole, once = gradients_of(fast_meta_step, model, batch, **options)
    twice = {name: 2 * gradient for name, gradient in once.items()}

    def work() -> Any:
        ddp, mine = DistributedDataParallel(tiny_model()), parts[dist.get_rank()]
        first = fast_meta_step(ddp, mine, **options)
        losses = torch.stack([first.outer_loss, first.query_loss, first.lm_loss, first.inner_loss])
        got = [gradients(ddp.module)]
        fast_meta_step(ddp, mine, **options)
        got.append(gradients(ddp.module))
        ddp.zero_grad()
        with ddp.no_sync():
            fast_meta_step(ddp, mine, **options)
        fast_meta_step(ddp, mine, **options)
        got.append(gradients(ddp.module))
        ddp.zero_grad()
        counts = dict(query_count=len(batch.query_ids), lm_count=len(batch.context_ids))
        fast_meta_step(ddp, mine, **options, **counts)
        return losses, [*got, gradients(ddp.module)]

    for losses, got in in_processes(count, work):
        for each, expected in zip(got, (once, twice, twice, once), strict=True):
            assert worst_error(each, expected)[0] < 1e-9
        names = ("outer_loss", "query_loss", "lm_loss", "inner_loss")
        for loss, name in zip(losses, names, strict=True):
            torch.testing.assert_close(loss, getattr(whole, name))


@PROCESSES
def test_a_step_that_fails_in_one_process_fails_in_all(
    count: int, tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is not finite, refuses the model or an argument; and the next one goes on. Of
    sharded weights likewise before the first pass.
    """
    batch = make_batch("one-each")

    def refuse(*args: Any) -> None:
        raise UserError("model: refused")

    def work() -> list[str]:
        ddp, first = DistributedDataParallel(tiny_model()), dist.get_rank() == 0
        sharded = shard(tiny_model())
        mine = batch.select([dist.get_rank()])[0]
        predictions = random_teacher(mine).logits
        assert predictions is not None
        found, wrong = [], TeacherTargets.from_logits(predictions * torch.nan)
        right, none = (
            TeacherTargets.from_logits(predictions),
            None if first else random_teacher(mine),
        )

        def caught(model: Any, **options: Any) -> None:
            with pytest.raises((FloatingPointError, UserError, ProcessLost)) as caught:
                fast_meta_step(model, mine, recompute="block", **options)
            found.append(str(caught.value).split(":")[0])

        caught(ddp, teacher=wrong if first else right)
        caught(ddp, teacher=none)
        caught(sharded, teacher=none)
        caught(ddp, objective="gold", lm_batch="rows" if first else None)
        if first:
            monkeypatch.setattr(verify, "_check_same", refuse)
        ddp.zero_grad()
        caught(ddp, objective="gold", inner_params="linear")
        assert not first or all(parameter.grad is None for parameter in ddp.parameters())
        caught(sharded, objective="gold", inner_params="linear")
        monkeypatch.undo()
        fast_meta_step(ddp, mine, objective="gold", inner_params="linear")
        return found

    mine, *others = in_processes(count, work)
    assert mine == ["teacher", "teacher", "teacher", "lm_batch", "model", "model"]
    assert others == [["step", "step", "step", "step", "step", "model"]] * (count - 1)


@PROCESSES
def test_processes_that_learn_of_a_failure_late_raise_at_the_same_step(
    count: int, tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, of which one knows before its next step, and the others do not yet; also after
    what one refused at once.
    """
    batch = make_batch("one-each")

    class Arrival:
        query, synchronize = staticmethod(lambda: dist.get_rank() == 0), staticmethod(lambda: None)

    def work() -> list[tuple[int, str]]:
        monkeypatch.setattr(failures, "_arrival", lambda device: Arrival())
        ddp, mine = DistributedDataParallel(tiny_model()), batch.select([dist.get_rank()])[0]
        predictions = random_teacher(mine).logits
        assert predictions is not None
        teacher, wrong = map(TeacherTargets.from_logits, (predictions, predictions * torch.nan))
        raised = []
        with found_on_the_device():
            for step in range(8):
                last = dist.get_rank() == count - 1
                targets = {1: wrong, 4: None}.get(step, teacher) if last else teacher
                try:
                    fast_meta_step(ddp, mine, teacher=targets)
                except (FloatingPointError, UserError, ProcessLost) as error:
                    raised.append((step, type(error).__name__))
        return raised

    *others, last = in_processes(count, work, longest=30.0)
    late = [(3, "FloatingPointError"), (6, "ProcessLost")]
    assert others == [late] * (count - 1)
    assert last == [late[0], (4, "UserError"), late[1]]


def test_gradients_are_summed_within_the_memory_of_a_bucket(tiny_model: Build) -> None:
    bucket = 2048

    def work() -> tuple[int, bool]:
        model = tiny_model()
        for number, parameter in enumerate(model.parameters()):
            gradient = torch.full(parameter.shape, dist.get_rank() + 1.0, dtype=parameter.dtype)
            strided = gradient.dim() == 2 and number % 2 == 0
            parameter.grad = gradient.T.contiguous().T if strided else gradient
        first, *rest = model.parameters()
        first.grad = None if dist.get_rank() else first.grad
        with PeakMemory(model_tensors(model)) as memory:
            before = memory.live_bytes
            reduce_gradients(model.parameters(), bucket_bytes=bucket)
            own = memory.peak_bytes - before
        right = all((parameter.grad == 3).all() for parameter in rest)
        return own, right and bool((first.grad == 1).all())

    (without, right), (with_zeros, right_too) = in_processes(2, work)
    first = next(tiny_model().parameters())
    assert right and right_too
    assert without <= 2 * bucket
    assert with_zeros <= 2 * bucket + first.numel() * first.element_size()


def test_rates_for_another_number_of_groups_are_an_error(make_batch: Build) -> None:
    with pytest.raises(UserError, match=r"inner_lr: expected a tensor \[\] or \[3\]"):
        share_of(make_batch("one-each"), 0, 2, inner_lr=torch.ones(2))
