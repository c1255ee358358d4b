"""``check_exactness`` says "not exact" of every fault of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from gdprompt_fast import MetaBatch, MetaStepConfig, check_exactness, fast_meta_step
from gdprompt_fast.exactness import check, engine
from gdprompt_fast.meta import step
from gdprompt_fast.models import architecture
from helpers.models import one_row

Build = Callable[..., Any]
GOLD: dict[str, Any] = dict(objective="gold", inner_lr=0.1)


def scaled_second_order(by: float) -> Callable[..., Any]:
    """An engine whose second-order term is that many times what it should be."""

    def step(model: nn.Module, batch: MetaBatch, config: MetaStepConfig, **data: Any) -> Any:
        first_order = dataclasses.replace(config, first_order=True)
        if config.first_order:
            return fast_meta_step(model, batch, config=first_order, **data)
        fast_meta_step(model, batch, config=first_order, **data)
        first = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        out = fast_meta_step(model, batch, config=config, **data)
        for name, parameter in model.named_parameters():
            parameter.grad = first[name] + by * (parameter.grad - first[name])
        return out

    return step


def changed_config(change: Callable[[MetaStepConfig], dict[str, Any]]) -> Callable[..., Any]:
    def step(model: nn.Module, batch: MetaBatch, config: MetaStepConfig, **data: Any) -> Any:
        other = dataclasses.replace(config, **change(config))
        return fast_meta_step(model, batch, config=other, **data)

    return step


def changed_batch(change: Callable[[MetaBatch], MetaBatch]) -> Callable[..., Any]:
    def step(model: nn.Module, batch: MetaBatch, **options: Any) -> Any:
        return fast_meta_step(model, change(batch), **options)

    return step


def without_a_group(batch: MetaBatch) -> MetaBatch:
    rows = batch.query_group != batch.query_group.max()
    names = ("query_ids", "query_mask", "response_mask", "query_group")
    return dataclasses.replace(batch, **{n: getattr(batch, n)[rows] for n in names})


def with_another_mask(batch: MetaBatch) -> MetaBatch:
    mask = batch.response_mask.clone()
    mask[0, 1] = True
    return dataclasses.replace(batch, response_mask=mask)


def half_first_order(
    model: nn.Module, batch: MetaBatch, config: MetaStepConfig, **data: Any
) -> Any:
    first_order = dataclasses.replace(config, first_order=True)
    fast_meta_step(model, batch, config=first_order, **data)
    first = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    out = fast_meta_step(model, batch, config=config, **data)
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            parameter.grad = first[name]
    return out


def no_gradient_of_a_norm(model: nn.Module, batch: MetaBatch, **options: Any) -> Any:
    out = fast_meta_step(model, batch, **options)
    model.get_parameter("model.norm.weight").grad = None
    return out


FAULTS: dict[str, Callable[..., Any]] = {
    "first-order": changed_config(lambda _: dict(first_order=True)),
    "no second-order term in half": half_first_order,
    "1 % more of the second-order term": scaled_second_order(1.01),
    "0.1 % less of the second-order term": scaled_second_order(0.999),
    "dropped group": changed_batch(without_a_group),
    "wrong mask": changed_batch(with_another_mask),
    "missing λ": changed_config(lambda _: dict(lm_weight=0.0)),
    "another η": changed_config(lambda own: dict(inner_lr=1.001 * own.inner_lr)),
    "no gradient of a norm": no_gradient_of_a_norm,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_engine_is_found(
    fault: str, tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "fast_meta_step", FAULTS[fault])
    batch = make_batch() if fault == "dropped group" else one_row(make_batch())
    report = check_exactness(tiny_model(), batch, lm_weight=0.3, **GOLD)
    assert report.verdict == "not exact", report.table()
    if fault == "no gradient of a norm":
        assert "model.norm.weight" in report.reasons[0]
        assert any("without a gradient" in reason for reason in report.reasons)


@pytest.mark.parametrize("fault", ["first-order", "1 % more of the second-order term"])
def test_in_fp32_too(
    fault: str, tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        check, "obstacle_to", lambda dtype, *_: "no" if dtype == torch.float64 else None
    )
    monkeypatch.setattr(engine, "fast_meta_step", FAULTS[fault])
    report = check_exactness(tiny_model(), one_row(make_batch()), **GOLD)
    assert report.verdict == "not exact" and report.dtype == "float32", report.table()


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine refuses nothing on the modules that it does not call."""
    monkeypatch.setattr(architecture, "check_never_run", lambda *_: None)
    monkeypatch.setattr(step, "verify_model", lambda *_: None)


@pytest.mark.transformers
@pytest.mark.usefixtures("unguarded")
def test_a_hook_that_the_engine_does_not_see_is_found(tiny_model: Build, make_batch: Build) -> None:
    model = tiny_model()

    def scale(_: Any, __: Any, output: Any) -> Any:
        output.logits = 1.001 * output.logits
        return output

    model.register_forward_hook(scale)
    report = check_exactness(model, one_row(make_batch()), **GOLD)
    assert report.verdict == "not exact" and "logits at θ" in report.reasons[0], report.table()


@pytest.mark.transformers
def test_a_changed_layer_is_run_as_it_is(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 1.01 * own(self, x))
    report = check_exactness(tiny_model(), one_row(make_batch()), **GOLD)
    assert report.exact, report.table()


@pytest.mark.transformers
@pytest.mark.usefixtures("unguarded")
def test_an_autocast_inside_the_model_is_found(tiny_model: Build, make_batch: Build) -> None:
    model = tiny_model().float()
    own = model.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return own(*args, **kwargs)

    model.forward = wrapped
    report = check_exactness(model, one_row(make_batch()), **GOLD)
    assert report.verdict == "not exact" and "as it is called" in report.reasons[0]
