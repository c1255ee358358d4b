"""Steps replayed as graphs, on tapes that stand in for CUDA's: the bits of an eager step, on other
batches, weights and numbers than were recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdprompt_fast import LMBatch, MetaBatch, MetaStepOutput, TeacherTargets, fast_meta_step
from gdprompt_fast.meta import capture
from helpers.captured import gold_step, gradients, recorded, same

pytestmark = pytest.mark.usefixtures("tapes")
Build = Callable[..., Any]


def teacher_of(batch: MetaBatch, head: Tensor, seed: int) -> TeacherTargets:
    """Random final states of a teacher with a head of its own."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch.layout.tokens, head.shape[1], generator=generator, dtype=head.dtype)
    return TeacherTargets(hidden=hidden, head=head)


OPTIONS: dict[str, dict[str, Any]] = {
    "gold": dict(objective="gold"),
    "kl": {},
    "kl, the mean over tokens": dict(outer_reduction="mean"),
    "with L_LM on the contexts": dict(lm_weight=0.3),
    "with L_LM on other texts": dict(lm_weight=0.3, lm_batch=True),
    "two inner steps": dict(inner_steps=2),
    "three inner steps": dict(inner_steps=3, objective="gold"),
    "first order": dict(first_order=True),
    "micro-groups": dict(micro_groups=2, lm_weight=0.2),
    "a rate for every group": dict(inner_lr="groups"),
    "a count of a larger batch": dict(query_count=7, lm_count=9, lm_weight=0.1),
    "plain ops": dict(backend="torch"),
}


def arguments(options: dict[str, Any], batch: MetaBatch, head: Tensor, step: int) -> dict[str, Any]:
    """Of a step: every number is another than at the step before."""
    given = {"inner_lr": 0.1, **options}
    if given["inner_lr"] == "groups":
        given["inner_lr"] = torch.linspace(0.05, 0.1 + 0.01 * step, batch.groups).double()
    else:
        given["inner_lr"] *= 1 + 0.5 * step
    if given.get("lm_weight"):
        given["lm_weight"] *= 1 + step
    if given.get("query_count"):
        given["query_count"] += step
    if given.get("lm_batch"):
        ids, mask = batch.query_ids.flip(0), batch.query_mask.flip(0)
        given["lm_batch"] = LMBatch(ids, mask)
    if given.get("objective") != "gold":
        given["teacher"] = teacher_of(batch, head, step)
    return given


def not_recorded(_: Any, key: Any, unit: Any, inputs: Any, trained: Any) -> tuple[Any, str]:
    """In the place of ``Graphs.run``: the same work on the same shapes, by Python."""
    return unit(inputs), "not recorded"


def check_replays(
    model: nn.Module,
    make_batch: Build,
    kind: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    rtol: float = 1e-11,
) -> None:
    """Three steps on other batches, weights and numbers each: one that is eager, since no graph has
    these shapes yet, one that is recorded and one that is a replay.
    """
    head = torch.randn_like(model.get_output_embeddings().weight)
    for step in range(3):
        batch = make_batch(kind, seed=step)
        given = arguments(options, batch, head, step)
        out = fast_meta_step(model, batch, **given)
        ours = gradients(model)
        assert out.captured is (step > 0), out.eager
        if out.captured:
            check_eagerly(model, batch, given, out, ours, monkeypatch, rtol)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), ours, strict=True):
                if gradient is not None:
                    parameter -= 0.1 * gradient


def check_eagerly(
    model: nn.Module,
    batch: MetaBatch,
    given: dict[str, Any],
    out: MetaStepOutput,
    ours: list[Tensor | None],
    monkeypatch: pytest.MonkeyPatch,
    rtol: float,
) -> None:
    """A step without graphs has its bits, and one by other code its values."""
    with monkeypatch.context() as eagerly:
        eagerly.setattr(capture.Graphs, "run", not_recorded)
        same_work = fast_meta_step(model, batch, **given)
    assert torch.equal(out.outer_loss, same_work.outer_loss)
    assert same(ours, gradients(model))
    plain = fast_meta_step(model, batch, **given, capture="never")
    assert not plain.captured
    for mine, yours in zip(ours, gradients(model), strict=True):
        assert (mine is None) == (yours is None)
        if mine is not None:
            torch.testing.assert_close(mine, yours, rtol=rtol, atol=rtol / 10)
    for name in ("outer_loss", "inner_loss", "lm_loss"):
        close = dict(rtol=rtol, atol=0)
        torch.testing.assert_close(getattr(out, name), getattr(plain, name), **close)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_replay_has_the_bits_of_an_eager_step(
    tiny_model: Build, make_batch: Build, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_replays(tiny_model("llama-tied"), make_batch, "grouped", options, monkeypatch)


@pytest.mark.parametrize("kind", ["one-each", "uneven"])
@pytest.mark.parametrize("options", ["kl", "micro-groups", "with L_LM on other texts"])
def test_other_batches_are_replayed(
    tiny_model: Build, make_batch: Build, kind: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_replays(tiny_model("llama-tied"), make_batch, kind, OPTIONS[options], monkeypatch)


@pytest.mark.parametrize("inner", ["full", "lora"])
def test_adapters_outside_and_inside_are_replayed(
    lora_model: Build, make_batch: Build, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(inner_params=inner, inner_steps=2, lm_weight=0.2)
    check_replays(lora_model(), make_batch, "grouped", options, monkeypatch)


@pytest.mark.parametrize("name", ["llama-untied", "gpt2-conv1d-positions", "llama-biases"])
def test_other_layers_are_replayed(
    tiny_model: Build, make_batch: Build, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_replays(tiny_model(name), make_batch, "grouped", dict(inner_steps=2), monkeypatch)


def test_bf16_is_replayed(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama-tied", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check_replays(model, make_batch, "grouped", dict(lm_weight=0.2), monkeypatch, rtol=0.1)


def test_recomputed_blocks_could_be_replayed(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not, as long as nobody has seen it on a GPU."""
    model, options = tiny_model("llama-tied"), dict(recompute="block", inner_steps=2)
    out = fast_meta_step(model, make_batch(), objective="gold", **options)
    assert "recomputed blocks" in out.eager
    model.zero_grad()
    monkeypatch.setattr(
        "gdprompt_fast.meta.step.why_eager",
        lambda _, config, __: 'capture="never"' if config.capture == "never" else "",
    )
    check_replays(model, make_batch, "grouped", options, monkeypatch)


def test_gradients_are_added_to_zeroed_or_taken_over(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model("llama-tied"), make_batch()
    recorded(model, batch)
    gold_step(model, batch)
    once = gradients(model)
    for _ in range(2):
        assert gold_step(model, batch).captured
    for total, one in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(total, 2 * one, rtol=1e-12, atol=1e-14)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # somebody else's
    assert gold_step(model, batch).captured
    for total, one in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(total, 1 + one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("view", [False, True], ids=["the tensor", "a view of it"])
def test_a_gradient_that_is_kept_does_not_change(
    tiny_model: Build, make_batch: Build, view: bool
) -> None:
    model, batch = tiny_model("llama-tied"), make_batch()
    recorded(model, batch)
    gold_step(model, batch)
    kept = [p.grad.view(-1) if view else p.grad for p in model.parameters()]
    values = [grad.clone() for grad in kept]
    model.zero_grad()
    for seed in range(1, 4):
        out = gold_step(model, make_batch(seed=seed))
        model.zero_grad()
    assert out.captured, "not recorded again"
    assert all(map(torch.equal, kept, values))


def test_a_parameter_without_a_gradient_keeps_none(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model("llama-tied"), make_batch()
    model.stranger = nn.Parameter(torch.ones(3, dtype=torch.float64))
    for _ in range(3):
        out = gold_step(model, batch, inner_params=lambda name, _: name != "stranger")
        assert model.stranger.grad is None
    assert out.captured, out.eager


def changed(model: Any, what: str) -> None:
    if what == "a hook":
        model.model.layers[0].register_forward_hook(lambda *_: None)
    elif what == "a forward":
        own = model.model.layers[0].mlp.forward
        model.model.layers[0].mlp.forward = lambda x: 2 * own(x)
    elif what == "what is trained":
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    elif what == "a weight's place":
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data = 1.5 * weight.data
    elif what == "a configuration":
        model.config.rms_norm_eps = 0.1
    elif what == "a hook on a gradient":
        model.model.norm.weight.register_hook(lambda grad: 2 * grad)


@pytest.mark.parametrize(
    "what",
    [
        *("a hook", "a forward", "what is trained", "a weight's place", "a configuration"),
        "a hook on a gradient",
    ],
)
def test_after_a_change_nothing_old_is_replayed(
    tiny_model: Build, make_batch: Build, what: str
) -> None:
    model, batch = tiny_model("llama-tied"), make_batch()
    recorded(model, batch)
    changed(model, what)
    for _ in range(3):
        out = gold_step(model, batch, verify="never")
        ours = gradients(model)
        gold_step(model, batch, verify="never", capture="never")
        for mine, plain in zip(ours, gradients(model), strict=True):
            if mine is None or plain is None:
                assert mine is plain
            else:
                torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-13)
    runs_python = what in ("a hook", "a forward", "a hook on a gradient")
    assert out.captured is not runs_python, out.eager


@pytest.mark.parametrize("bad", ["inner loss", "teacher"])
def test_what_is_not_finite_is_a_flag_until_it_is_asked_for(
    tiny_model: Build, make_batch: Build, bad: str
) -> None:
    model, batch = tiny_model("llama-tied"), make_batch()
    head = torch.randn_like(model.get_output_embeddings().weight)
    for step in range(3):
        teacher = teacher_of(batch, head, step)
        fine = fast_meta_step(model, batch, teacher=teacher)
        assert fine.found_inf == 0
        fine.check()
    assert fine.captured
    if bad == "teacher":
        teacher.hidden[0, 0] = torch.nan
    else:
        with torch.no_grad():
            model.model.norm.weight[0] = torch.nan
    out = fast_meta_step(model, batch, teacher=teacher)
    assert out.captured and out.found_inf == 1
    with pytest.raises(FloatingPointError, match=bad):
        out.check()
