"""Five steps of every option leave as many tensors alive as three do, the garbage collector off."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdprompt_fast import (
    MetaBatch,
    TeacherTargets,
    check_exactness,
    fast_meta_step,
    inner_step,
    reference_meta_step,
)

Build = Callable[..., Any]


class Storages(TorchDispatchMode):
    """Counts the storages made inside that are alive, whoever holds them: autograd's graph too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                reference = StorageWeakRef(leaf.untyped_storage())
                self.seen[reference.cdata] = reference
        return out

    @property
    def alive(self) -> int:
        self.seen = {key: ref for key, ref in self.seen.items() if not ref.expired()}
        return len(self.seen)


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive_after(step: Callable[[], Any]) -> list[int]:
    counts = []
    with Storages() as storages:
        for _ in range(5):
            step()
            counts.append(storages.alive)
    return counts


def assert_no_leak(step: Callable[[], Any]) -> None:
    counts = alive_after(step)
    assert counts[-1] <= counts[2], f"tensors alive after each step: {counts}"


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "first-order": dict(first_order=True),
    "two-steps": dict(inner_steps=2),
    "lm-on-contexts": dict(lm_weight=0.1),
    "norms-alone": dict(inner_params=lambda name, _: "norm" in name),
    "unverified": dict(verify="never"),
}


def step_of(model: Any, batch: MetaBatch, **options: Any) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        fast_meta_step(model, batch, objective="gold", inner_lr=0.1, **options)

    return step


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_leave_nothing_alive(
    options: dict[str, Any], recompute: str, tiny_model: Build, make_batch: Build
) -> None:
    assert_no_leak(step_of(tiny_model(), make_batch(), recompute=recompute, **options))


@pytest.mark.usefixtures("without_collector")
def test_steps_on_a_model_with_transposed_layers_leave_nothing_alive(
    tiny_model: Build, make_batch: Build
) -> None:
    assert_no_leak(step_of(tiny_model("gpt2-conv1d-positions"), make_batch(), recompute="block"))


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("inner_params", ["full", "lora"])
def test_steps_with_adapters_leave_nothing_alive(
    inner_params: str, recompute: str, lora_model: Build, make_batch: Build
) -> None:
    options = dict(inner_params=inner_params, recompute=recompute)
    assert_no_leak(step_of(lora_model(), make_batch(), **options))


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_language_modelling_batch_and_a_teacher_leave_nothing_alive(
    recompute: str, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(), make_batch()
    teacher = TeacherTargets.from_logits(torch.randn(6, 67, dtype=torch.float64))
    lm_batch = (batch.context_ids, batch.context_mask)

    def step() -> None:
        model.zero_grad()
        options = dict(lm_weight=0.1, lm_batch=lm_batch, recompute=recompute)
        fast_meta_step(model, batch, teacher=teacher, **options)

    assert_no_leak(step)


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_bf16_leaves_nothing_alive(recompute: str, tiny_model: Build, make_batch: Build) -> None:
    step = step_of(tiny_model(dtype=torch.float32), make_batch(), recompute=recompute)

    def in_bf16() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            step()

    assert_no_leak(in_bf16)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_step_that_raises_leaves_nothing_alive(
    recompute: str, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(), make_batch()

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = model.model.layers[0].mlp.up_proj.weight.register_hook(fail)

    def step() -> None:
        with pytest.raises(MemoryError):
            fast_meta_step(model, batch, objective="gold", recompute=recompute)
        gc.collect()  # a traceback holds its frames in a cycle

    assert_no_leak(step)
    handle.remove()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_inner_steps_and_what_runs_at_them_leave_nothing_alive(
    inner_steps: int, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(), make_batch()
    tokens = batch.context_ids, batch.context_mask

    def step() -> None:
        update = inner_step(model, *tokens, inner_lr=0.1, inner_steps=inner_steps)
        with update.applied_to(model, torch.arange(3)):
            model(batch.query_ids)

    assert_no_leak(step)


@pytest.mark.usefixtures("without_collector")
def test_the_reference_leaves_nothing_alive(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model(), make_batch()

    def step() -> None:
        model.zero_grad()
        reference_meta_step(model, batch, objective="gold")

    assert_no_leak(step)


def test_a_check_leaves_nothing_alive(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model(), make_batch()

    counts = []
    for _ in range(3):
        check_exactness(model, batch, inner_lr=0.1, objective="gold")
        gc.collect()
        counts.append(sum(issubclass(type(each), Tensor) for each in gc.get_objects()))
    assert counts[-1] <= counts[1], f"tensors alive after each check: {counts}"
