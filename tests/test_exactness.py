"""``check_exactness`` says "exact" of what is, "not exact" of every fault, and leaves no trace."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, VOCABULARY, last_tokens, ragged
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from gdprompt_fast import MetaBatch, TeacherTargets, check_exactness, fast_meta_step
from gdprompt_fast.cli.main import main
from gdprompt_fast.errors import UserError
from gdprompt_fast.exactness import check, engine, gradient, memory, objective
from gdprompt_fast.exactness.differences import central_difference, rounding_noise
from gdprompt_fast.exactness.report import Precision
from gdprompt_fast.meta import step
from gdprompt_fast.models import architecture
from gdprompt_fast.runs import check_run as command

Build = Callable[..., Any]
GOLD: dict[str, Any] = dict(objective="gold", inner_lr=0.1)


def one_row(batch: MetaBatch) -> MetaBatch:
    """The first context and query."""
    return MetaBatch(*(getattr(batch, f.name)[:1] for f in dataclasses.fields(batch)[:5]))


def random_teacher(batch: MetaBatch) -> TeacherTargets:
    generator = torch.Generator().manual_seed(7)
    tokens = int(batch.response_mask.sum())
    logits = 2 * torch.randn(tokens, VOCABULARY, generator=generator)
    logits[:, 5:9] = -torch.inf
    return TeacherTargets.from_logits(logits)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_exact(name: str, tiny_model: Build, make_batch: Build) -> None:
    report = check_exactness(tiny_model(name), one_row(make_batch()), **GOLD)
    assert report.exact, report.table()
    assert report.power > 300 and report.dtype == "float64"


@pytest.mark.parametrize("inner", ["full", "lora"])
def test_lora_outside_is_exact_with_either_inside(
    inner: str, lora_model: Build, make_batch: Build
) -> None:
    model, batch = lora_model("llama-tied"), one_row(make_batch())
    teacher = random_teacher(batch)
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
        options["teacher"] = random_teacher(batch)
    report = check_exactness(tiny_model("llama-untied"), batch, **options)
    assert report.exact, report.table()


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


def scaled_second_order(by: float) -> Callable[..., Any]:
    """An engine whose second-order term is that many times what it should be."""

    def step(model: nn.Module, batch: MetaBatch, first_order: bool, **options: Any) -> Any:
        if first_order:
            return fast_meta_step(model, batch, first_order=True, **options)
        fast_meta_step(model, batch, first_order=True, **options)
        first = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        out = fast_meta_step(model, batch, **options)
        for name, parameter in model.named_parameters():
            parameter.grad = first[name] + by * (parameter.grad - first[name])
        return out

    return step


def changed_arguments(change: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    def step(model: nn.Module, batch: MetaBatch, **options: Any) -> Any:
        return fast_meta_step(model, **{"batch": batch, **options, **change(batch, **options)})

    return step


def without_a_group(batch: MetaBatch, **_: Any) -> dict[str, Any]:
    rows = batch.query_group != batch.query_group.max()
    names = ("query_ids", "query_mask", "response_mask", "query_group")
    return dict(batch=dataclasses.replace(batch, **{n: getattr(batch, n)[rows] for n in names}))


def with_another_mask(batch: MetaBatch, **_: Any) -> dict[str, Any]:
    mask = batch.response_mask.clone()
    mask[0, 1] = True
    return dict(batch=dataclasses.replace(batch, response_mask=mask))


def half_first_order(model: nn.Module, batch: MetaBatch, first_order: bool, **options: Any) -> Any:
    fast_meta_step(model, batch, first_order=True, **options)
    first = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    out = fast_meta_step(model, batch, first_order=first_order, **options)
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            parameter.grad = first[name]
    return out


def no_gradient_of_a_norm(model: nn.Module, batch: MetaBatch, **options: Any) -> Any:
    out = fast_meta_step(model, batch, **options)
    model.get_parameter("model.norm.weight").grad = None
    return out


FAULTS: dict[str, Callable[..., Any]] = {
    "first-order": changed_arguments(lambda *_, **__: dict(first_order=True)),
    "no second-order term in half": half_first_order,
    "1 % more of the second-order term": scaled_second_order(1.01),
    "0.1 % less of the second-order term": scaled_second_order(0.999),
    "dropped group": changed_arguments(without_a_group),
    "wrong mask": changed_arguments(with_another_mask),
    "missing λ": changed_arguments(lambda *_, **__: dict(lm_weight=0.0)),
    "another η": changed_arguments(lambda *_, inner_lr, **__: dict(inner_lr=1.001 * inner_lr)),
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


@pytest.mark.usefixtures("unguarded")
def test_a_hook_that_the_engine_does_not_see_is_found(tiny_model: Build, make_batch: Build) -> None:
    model = tiny_model()

    def scale(_: Any, __: Any, output: Any) -> Any:
        output.logits = 1.001 * output.logits
        return output

    model.register_forward_hook(scale)
    report = check_exactness(model, one_row(make_batch()), **GOLD)
    assert report.verdict == "not exact" and "logits at θ" in report.reasons[0], report.table()


def test_a_changed_layer_is_run_as_it_is(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 1.01 * own(self, x))
    report = check_exactness(tiny_model(), one_row(make_batch()), **GOLD)
    assert report.exact, report.table()


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


@pytest.fixture
def checked(model_folder: Path, triples: Path) -> list[str]:
    files = ["--model", str(model_folder), "--data", str(triples)]
    return [*files, "--device", "cpu", "--inner-lr", "0.1"]


def test_the_command_prints_the_table_and_its_exit_code_is_the_verdict(
    checked: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "report.json"
    assert main(["check", *checked, "--json", str(path)]) == 0
    assert "exact (backend torch, η = 0.1)" in capsys.readouterr().out
    assert json.loads(path.read_text())["exact"] is True
    assert main(["check", *checked, "--inner-lr", "1e-12", "--objective", "gold"]) == 1
    assert "cannot tell" in capsys.readouterr().out
    assert main(["check", *checked, "--examples", "0"]) == 2
    monkeypatch.setattr(engine, "fast_meta_step", FAULTS["first-order"])
    lora = ["--lora-rank", "1", "--examples", "1", "--objective", "gold"]
    assert main(["check", *checked, *lora]) == 1
    assert "not exact" in capsys.readouterr().out


TRAIN = ["--steps", "2", "--batch-size", "2", "--objective", "gold", "--checkpoint-every", "1"]


def test_training_stops_before_its_first_step_where_the_engine_is_not_exact(
    checked: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = ["train", *checked, *TRAIN, "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "fast_meta_step", FAULTS["first-order"])
        assert main(train) == 1
        error = capsys.readouterr().err
        assert "stopped: check: expected the exact meta-gradient" in error
        assert "--no-check" in error and not (tmp_path / "metrics.jsonl").exists()
        assert main([*train, "--resume"]) == 1, "a run that has not started is checked"
        assert main([*train, "--resume", "--no-check"]) == 0
    monkeypatch.setattr(command, "check_exactness", None)
    assert main([*train, "--resume"]) == 0, "a run that has started is not checked again"


def test_training_warns_of_what_cannot_be_told_and_of_bf16(
    checked: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = ["train", *checked, *TRAIN]
    small = ["--inner-lr", "1e-12", "--output", str(tmp_path / "a")]
    assert main([*train, *small]) == 0
    assert "warning: check: At η = 1e-12" in capsys.readouterr().err
    poor = Precision((0.94, 1.0), (0.95, 1.0), (1.0, 1.0))
    monkeypatch.setattr(check, "bf16_precision", lambda *_: poor)
    assert main([*train, "--output", str(tmp_path / "b")]) == 0
    assert "warning" not in capsys.readouterr().err
    in_bf16 = ["--compute-dtype", "bfloat16", "--output", str(tmp_path / "c")]
    assert main([*train, *in_bf16]) == 0
    assert "cosine of 0.940" in capsys.readouterr().err
