"""``check_exactness`` says "exact" of what is, tells what it cannot tell, and leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gdprompt_fast import MetaBatch, TeacherTargets, check_exactness
from gdprompt_fast.errors import UserError
from gdprompt_fast.exactness import check, engine, gradient, memory, objective
from gdprompt_fast.exactness.differences import central_difference, rounding_noise
from helpers.models import MODELS, VOCABULARY, last_tokens, one_row, ragged, random_teacher

Build = Callable[..., Any]
GOLD: dict[str, Any] = dict(objective="gold", inner_lr=0.1)


@pytest.mark.transformers
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_exact(name: str, tiny_model: Build, make_batch: Build) -> None:
    report = check_exactness(tiny_model(name), one_row(make_batch()), **GOLD)
    assert report.exact, report.table()
    assert report.power > 300 and report.dtype == "float64"


@pytest.mark.transformers
@pytest.mark.parametrize("inner", ["full", "lora"])
def test_lora_outside_is_exact_with_either_inside(
    inner: str, lora_model: Build, make_batch: Build
) -> None:
    model, batch = lora_model("llama-tied"), one_row(make_batch())
    teacher = random_teacher(batch, torch.float32, ruled_out=slice(5, 9))
    report = check_exactness(model, batch, inner_lr=0.1, teacher=teacher, inner_params=inner)
    assert report.exact, report.table()


STEPS: dict[str, dict[str, Any]] = {
    "grouped-kl-lm": dict(kind="grouped", objective="kl", lm_weight=0.3),
    "uneven-two-steps": dict(kind="uneven", inner_steps=2, outer_reduction="mean"),
    "recomputed-lm-batch": dict(
        kind="one-each", recompute="block", lm_weight=0.3, lm_batch=ragged([5, 3], 6, seed=9)
    ),
    "part-inside": dict(kind="uneven", inner_params=lambda name, _: "mlp" in name),
}


@pytest.mark.parametrize("case", STEPS)
def test_groups_objectives_and_steps_are_exact(
    case: str, tiny_model: Build, make_batch: Build
) -> None:
    options = {**GOLD, **STEPS[case]}
    batch = make_batch(options.pop("kind"))
    if options["objective"] == "kl":
        options["teacher"] = random_teacher(batch, torch.float32, ruled_out=slice(5, 9))
    report = check_exactness(tiny_model("llama-untied"), batch, **options)
    assert report.exact, report.table()


@pytest.mark.transformers
def test_a_teacher_model_and_long_rows_in_parts_are_exact(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (objective, engine):
        monkeypatch.setattr(module, "LOGITS", 3 * VOCABULARY)
    model, batch = tiny_model("gpt-neox"), one_row(make_batch())
    prompt_ids = torch.cat([batch.context_ids, batch.query_ids], 1)
    mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    response = last_tokens(mask, batch.response_mask.sum(1).tolist())
    teacher = TeacherTargets.from_model(model, prompt_ids, mask, response)
    report = check_exactness(model, batch, inner_lr=0.1, teacher=teacher)
    assert report.exact, report.table()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_other_dtypes_are_checked_in_fp64(
    dtype: torch.dtype, tiny_model: Build, make_batch: Build
) -> None:
    report = check_exactness(tiny_model().to(dtype), one_row(make_batch()), **GOLD)
    assert report.exact and report.dtype == "float64", report.table()


def test_under_autocast_the_model_as_called_is_compared_in_bf16(
    tiny_model: Build, make_batch: Build
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        report = check_exactness(tiny_model().float(), one_row(make_batch()), **GOLD)
        assert torch.is_autocast_enabled("cpu")
    assert report.exact, report.table()
    assert report.findings[0].difference > 1e-4, "as called, the model was not in bf16"


def test_without_memory_for_fp64_it_is_fp32_and_without_that_nothing_can_be_told(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_model().float(), one_row(make_batch())
    sizes = {torch.float64: "a lot", torch.float32: None}
    monkeypatch.setattr(check, "obstacle_to", lambda dtype, *_: sizes[dtype])
    report = check_exactness(model, batch, **GOLD)
    assert report.exact and report.dtype == "float32", report.table()
    assert any("float64: a lot" in reason for reason in report.reasons)
    sizes[torch.float32] = "a lot too"
    report = check_exactness(model, batch, **GOLD)
    assert report.verdict == "cannot tell" and "a lot too" in report.table()


def test_memory_is_counted_before_it_is_taken(
    tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    assert memory.obstacle_to(torch.float64, model, "torch", "full") is None
    assert "Triton" in str(memory.obstacle_to(torch.float64, model, "triton", "full"))
    bytes_of_weights = 8 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(memory, "_available_bytes", lambda _: 10 * bytes_of_weights)
    assert "are free" in str(memory.obstacle_to(torch.float64, model, "torch", "full"))
    assert memory.obstacle_to(torch.float32, model, "torch", "full") is None


def test_code_that_cannot_run_in_fp64_is_checked_in_fp32(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.fast_meta_step

    def narrow(model: nn.Module, batch: MetaBatch, **options: Any) -> Any:
        if next(model.parameters()).dtype == torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return real(model, batch, **options)

    monkeypatch.setattr(engine, "fast_meta_step", narrow)
    report = check_exactness(tiny_model().float(), one_row(make_batch()), **GOLD)
    assert report.exact and report.dtype == "float32", report.table()
    assert any("found Double" in reason for reason in report.reasons)


def test_too_small_a_rate_cannot_be_told_and_the_suggested_one_can(
    tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(), one_row(make_batch())
    report = check_exactness(model, batch, objective="gold", inner_lr=1e-9)
    assert report.verdict == "cannot tell" and not report.exact, report.table()
    suggested = report.suggested_inner_lr
    assert suggested is not None and suggested < 0.01
    assert f"--inner-lr {suggested:g}" in report.table()
    again = check_exactness(model, batch, objective="gold", inner_lr=suggested)
    assert again.exact, again.table()
    without = check_exactness(model, batch, objective="gold", inner_lr=0.0)
    assert without.verdict == "cannot tell" and without.suggested_inner_lr is not None


def add_to_data(parameter: torch.Tensor) -> None:
    """As an optimizer that steps inside the backward."""
    parameter.data.add_(1e-3)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a check may not change: objects, bits, gradients and flags."""
    return {
        "parameters": [
            (id(p), p.data_ptr(), p.detach().clone(), p.requires_grad, p.dtype, id(p.grad))
            for p in model.parameters()
        ],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "buffers": [(id(b), b.clone()) for b in model.buffers()],
        "modes": [m.training for m in model.modules()],
        "attention": model.config._attn_implementation,
        "forwards": ["forward" in vars(m) for m in model.modules()],
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, list | tuple | dict):
        assert len(before) == len(after)
        pairs = (
            zip(before.values(), after.values(), strict=True)
            if isinstance(before, dict)
            else (zip(before, after, strict=True))
        )
        for pair in pairs:
            assert_same(*pair)
    else:
        assert before == after


@pytest.mark.transformers
@pytest.mark.parametrize("failure", [None, RuntimeError("stop"), KeyboardInterrupt()], ids=repr)
def test_the_model_is_left_as_it_was(
    failure: BaseException | None,
    tiny_model: Build,
    make_batch: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model().float().train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    moved_by_hook = model.model.layers[1].mlp.up_proj.weight
    moved_by_hook.register_post_accumulate_grad_hook(add_to_data)
    if failure is not None:

        def fail(*_: Any, **__: Any) -> None:
            raise failure

        monkeypatch.setattr(gradient, "central_difference", fail)
    before = state_of(model)
    arguments = (model, one_row(make_batch()))
    if failure is None:
        check_exactness(*arguments, inner_steps=2, **GOLD)
    else:
        with pytest.raises(type(failure)):
            check_exactness(*arguments, inner_steps=2, **GOLD)
    assert_same(before, state_of(model))


def test_what_the_engine_refuses_is_refused_here(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model(), make_batch()
    with pytest.raises(UserError, match="inner_lr"):
        check_exactness(model, batch, objective="gold", inner_lr=-1.0)
    model.model.layers[0].self_attn.attention_dropout = 0.5
    with pytest.raises(UserError, match="dropout"):
        check_exactness(model.train(), batch, objective="gold")


def test_the_report_is_readable_and_goes_into_json(tiny_model: Build, make_batch: Build) -> None:
    report = check_exactness(tiny_model(), one_row(make_batch()), **GOLD)
    data = json.loads(json.dumps(report.to_json()))
    assert data["verdict"] == "exact" and data["exact"] is True
    assert len(data["findings"]) == len(report.findings)
    assert all(finding["agrees"] for finding in data["findings"])
    table = report.table()
    for words in ("model's own", "along the meta-gradient", "in bf16", "first order", "exact ("):
        assert words in table
    assert report.precision is not None
    assert report.precision.gradient[0] > 0.98 and report.precision.first_order[0] < 0.98


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-6])
def test_derivatives_are_within_their_uncertainty(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def f(x: float) -> float:
        error = noise * float(torch.randn((), generator=generator))
        return float(torch.tensor(1 + 2 * x, dtype=torch.float64).sin().exp()) + error

    measured = rounding_noise(f, 1e-5)
    assert measured <= 3 * noise + 1e-13 and measured >= noise / 3
    exact = 2 * float(torch.tensor(1.0, dtype=torch.float64).cos()) * f(0)
    found = central_difference(f, 0.1, measured, enough=0.0)
    assert abs(found.value - exact) <= 3 * found.uncertainty
    assert found.uncertainty <= 1000 * noise + 1e-7
