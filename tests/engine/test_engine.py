"""``fast_meta_step`` equals materialised autograd: the loss and every meta-gradient tensor, in
fp64, to 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdprompt_fast import MetaBatch, TeacherTargets, fast_meta_step, reference_meta_step
from gdprompt_fast.ops.vocabulary import block as vocabulary_block
from gdprompt_fast.reference.compare import gradients_of, without_upcasts, worst_error
from helpers.models import MODELS, last_tokens, ragged, random_teacher

EXACT = 1e-9
Build = Callable[..., Any]


def assert_equal_steps(model: torch.nn.Module, batch: MetaBatch, **options: Any) -> None:
    """Both implementations on the same input; fails naming the parameter and the error."""
    if options.get("objective", "kl") == "kl":
        options.setdefault("teacher", random_teacher(batch))
    options.setdefault("inner_lr", 0.1)
    with without_upcasts(model):
        expected, reference = gradients_of(reference_meta_step, model, batch, **options)
    out, gradients = gradients_of(fast_meta_step, model, batch, **options)
    for field in ("outer_loss", "query_loss", "inner_loss"):
        got, want = float(getattr(out, field)), float(getattr(expected, field))
        assert got == pytest.approx(want, rel=EXACT), f"{field}: got {got}, expected {want}"
    assert float(out.lm_loss) == pytest.approx(float(expected.lm_loss), rel=EXACT)
    error, name = worst_error(gradients, reference)
    assert error <= EXACT, f"{name}: relative error {error:.1e}"


@pytest.mark.transformers
@pytest.mark.quick
@pytest.mark.parametrize("steps", [1, 2, 3], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_exact_full_inside_and_outside(
    name: str, steps: int, tiny_model: Build, make_batch: Build
) -> None:
    assert_equal_steps(tiny_model(name), make_batch("grouped"), inner_steps=steps)


@pytest.mark.transformers
@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_exact_with_the_gold_objective_and_a_language_modelling_term(
    name: str, tiny_model: Build, make_batch: Build
) -> None:
    assert_equal_steps(tiny_model(name), make_batch("uneven"), objective="gold", lm_weight=0.3)


@pytest.mark.transformers
@pytest.mark.quick
@pytest.mark.parametrize("inner", ["full", "linear", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_exact_with_lora(
    name: str, inner: str, lora_model: Build, make_batch: Build
) -> None:
    assert_equal_steps(lora_model(name), make_batch(), inner_params=inner)


@pytest.mark.transformers
@pytest.mark.quick
@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_exact_with_recomputed_blocks(
    name: str, steps: int, tiny_model: Build, make_batch: Build
) -> None:
    options: dict[str, Any] = dict(inner_steps=steps, lm_weight=0.3, recompute="block")
    assert_equal_steps(tiny_model(name), make_batch("grouped"), **options)


@pytest.mark.parametrize("inner", ["full", "lora", "norms"])
@pytest.mark.parametrize("outer", ["full", "lora", "norms"])
@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
def test_recomputed_blocks_are_exact_whatever_is_moved_and_trained(
    steps: int, outer: str, inner: str, lora_model: Build, make_batch: Build
) -> None:
    model = lora_model("llama-tied")
    if outer != "lora":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(outer == "full" or "norm" in name)
    assert_equal_steps(
        model,
        make_batch("uneven"),
        inner_params=(lambda name, _: "norm" in name) if inner == "norms" else inner,
        inner_steps=steps,
        lm_batch=ragged([5, 3], 6, seed=9),
        lm_weight=0.3,
        recompute="block",
    )


@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
def test_recomputed_blocks_give_the_first_order_answer_when_asked(
    steps: int, tiny_model: Build, make_batch: Build
) -> None:
    options: dict[str, Any] = dict(first_order=True, inner_steps=steps, recompute="block")
    assert_equal_steps(tiny_model("qwen3-head-norms"), make_batch("grouped"), **options)


@pytest.mark.parametrize("objective", ["kl", "gold"])
@pytest.mark.parametrize("kind", ["one-each", "grouped", "uneven"])
@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize("lm", ["no-lm", "lm-on-contexts", "lm-batch"])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_objectives_groups_and_language_modelling_terms_are_exact(
    name: str, lm: str, steps: int, kind: str, objective: str, tiny_model: Build, make_batch: Build
) -> None:
    options: dict[str, Any] = {}
    if lm != "no-lm":
        options["lm_weight"] = 0.3
    if lm == "lm-batch":
        options["lm_batch"] = ragged([5, 3], 6, seed=9)
    assert_equal_steps(
        tiny_model(name), make_batch(kind), objective=objective, inner_steps=steps, **options
    )


@pytest.mark.parametrize("rank", [1, 3], ids=lambda r: f"rank-{r}")
@pytest.mark.parametrize("outer", ["lora", "full"])
@pytest.mark.parametrize("inner", ["lora", "full"])
@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize("name", ["llama-tied", "gpt2-conv1d-positions"])
def test_lora_inside_and_outside_is_exact(
    name: str, steps: int, inner: str, outer: str, rank: int, lora_model: Build, make_batch: Build
) -> None:
    model = lora_model(name, rank)
    if outer == "full":
        model.requires_grad_(True)
    assert_equal_steps(
        model, make_batch("grouped"), inner_params=inner, inner_steps=steps, lm_weight=0.2
    )


@pytest.mark.parametrize("steps", [1, 3], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize("chosen", ["lora_", "lora_A", "lora_B.default.weight", "bias"])
def test_lora_with_biases_is_exact_whatever_part_of_it_is_inside(
    chosen: str, steps: int, lora_model: Build, make_batch: Build
) -> None:
    assert_equal_steps(
        lora_model("llama-tied", lora_bias=True),
        make_batch("uneven"),
        inner_params=lambda name, _: chosen in name,
        inner_steps=steps,
        lm_weight=0.2,
    )


@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize("trained", ["lora_", "layers"])
def test_first_order_with_lora_inside_is_exact(
    trained: str, steps: int, lora_model: Build, make_batch: Build
) -> None:
    model = lora_model("llama-tied")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    assert_equal_steps(
        model, make_batch(), inner_params="lora", inner_steps=steps, first_order=True
    )


@pytest.mark.quick
@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize(
    "chosen", ["mlp", "lm_head", "embed_tokens", "bias", "layernorm", "q_proj.weight"]
)
def test_a_chosen_part_of_the_parameters_inside_is_exact(
    chosen: str, steps: int, tiny_model: Build, make_batch: Build
) -> None:
    assert_equal_steps(
        tiny_model("llama-biases"),
        make_batch("grouped"),
        inner_params=lambda name, _: chosen in name,
        inner_steps=steps,
        lm_weight=0.2,
    )


def test_frozen_parts_outside_get_no_gradient_and_the_rest_is_exact(
    tiny_model: Build, make_batch: Build
) -> None:
    model = tiny_model("llama-tied")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.1" in name
    assert_equal_steps(model, make_batch(), lm_weight=0.2)
    assert model.model.embed_tokens.weight.grad is None


@pytest.mark.quick
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_many_vocabulary_blocks_give_the_same_as_one(
    name: str, tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_block, "TILE_ELEMENTS", 7 * 24)
    assert_equal_steps(tiny_model(name), make_batch("grouped"), inner_steps=2, lm_weight=0.2)


@pytest.mark.quick
def test_mean_reduction_over_response_tokens_is_exact(tiny_model: Build, make_batch: Build) -> None:
    assert_equal_steps(tiny_model(), make_batch("grouped"), outer_reduction="mean")


@pytest.mark.quick
@pytest.mark.parametrize("name", ["llama-tied", "gpt2-conv1d-positions"])
@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
def test_first_order_mode_equals_first_order_autograd(
    name: str, steps: int, tiny_model: Build, make_batch: Build
) -> None:
    assert_equal_steps(
        tiny_model(name), make_batch(), first_order=True, inner_steps=steps, lm_weight=0.2
    )


@pytest.mark.transformers
def test_a_teacher_model_gives_the_targets_of_its_own_logits(
    tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model("llama-tied"), make_batch()
    rows = []
    for c, cm, q, qm in zip(
        batch.context_ids, batch.context_mask, batch.query_ids, batch.query_mask, strict=True
    ):
        rows.append(torch.cat([c[cm], q[qm]]))
    lengths = [len(row) for row in rows]
    prompt_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    prompt_mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    response_mask = last_tokens(prompt_mask, batch.response_mask.sum(1).tolist())
    with without_upcasts(model):
        teacher = TeacherTargets.from_model(model, prompt_ids, prompt_mask, response_mask)
        logits = model(prompt_ids).logits[:, :-1][response_mask[:, 1:]]
    torch.testing.assert_close(teacher.materialised_logits(), logits.detach())
    assert teacher.logits is None
    assert_equal_steps(model, batch, teacher=teacher)


@pytest.mark.transformers
@pytest.mark.parametrize("name", MODELS)
def test_against_the_untouched_model_only_its_upcasts_differ(
    name: str, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(name), make_batch()
    for parameter in model.parameters():
        parameter.data *= 0.3 if parameter.dim() > 1 else 1.0  # weights of the size models have
    options: dict[str, Any] = dict(objective="gold", inner_lr=0.1)
    _, reference = gradients_of(reference_meta_step, model, batch, **options)
    _, gradients = gradients_of(fast_meta_step, model, batch, **options)
    error, name = worst_error(gradients, reference)
    assert error <= 1e-6, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", ["llama-tied", "gpt-neox"])
def test_in_fp32_the_error_is_that_of_fp32(name: str, tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model(name), make_batch()
    options: dict[str, Any] = dict(objective="gold", inner_lr=0.1)
    with without_upcasts(model):
        _, exact = gradients_of(reference_meta_step, model, batch, **options)
    model = model.float()
    _, gradients = gradients_of(fast_meta_step, model, batch, **options)
    error, parameter = worst_error(gradients, exact)
    assert error <= 1e-4, f"{parameter}: relative error {error:.1e}"


@pytest.mark.transformers
@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_the_first_order_answer_fails_by_a_wide_margin(
    name: str, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(name), make_batch()
    options: dict[str, Any] = dict(objective="gold", inner_lr=0.1)
    with without_upcasts(model):
        _, reference = gradients_of(reference_meta_step, model, batch, **options)
    _, first_order = gradients_of(fast_meta_step, model, batch, first_order=True, **options)
    error, _ = worst_error(first_order, reference)
    assert error > 1e-2, (
        f"the second-order term is only {error:.1e} of the gradient: the tests prove nothing"
    )
