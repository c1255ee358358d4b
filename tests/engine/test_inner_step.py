"""``inner_step`` and ``applied_to``: a batch of differently adapted models equals each on its
own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import functional_call

from gdprompt_fast import inner_step
from gdprompt_fast.models.inner_params import select_inner
from gdprompt_fast.ops.eager import lora as eager_lora
from gdprompt_fast.reference.compare import without_upcasts
from helpers.adapted import INNER_LR, adapted_copies
from helpers.models import MODELS

pytestmark = [pytest.mark.quick, pytest.mark.transformers]

Build = Callable[..., Any]


@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_differently_adapted_rows_equal_materialised_copies(
    name: str, steps: int, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(name), make_batch("grouped")
    rows = torch.tensor([2, 0, 0, 1])
    with without_upcasts(model):
        copies = adapted_copies(model, batch, "full", steps)
        expected = torch.cat(
            [
                functional_call(
                    model, copies[g], kwargs={"input_ids": batch.query_ids[i : i + 1]}
                ).logits
                for i, g in enumerate(rows)
            ]
        )
    update = inner_step(
        model,
        batch.context_ids,
        batch.context_mask,
        batch.context_group,
        inner_lr=INNER_LR,
        inner_steps=steps,
    )
    with update.applied_to(model, groups=rows):
        logits = model(input_ids=batch.query_ids).logits
    assert (logits - expected).norm() <= 1e-6 * expected.norm()  # the model's own attention upcasts
    assert not logits.requires_grad


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-conv1d-positions", "gpt-neox", "xglm"])
def test_generation_equals_that_of_materialised_copies_to_the_token(
    name: str, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(name), make_batch("one-each")
    update = inner_step(model, batch.context_ids, batch.context_mask, inner_lr=INNER_LR)
    # left padding, as generation wants it
    prompts = batch.query_ids[:, :4].clone()
    mask = torch.ones_like(prompts)
    mask[1, :2] = 0
    options: dict[str, Any] = dict(
        max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    with update.applied_to(model, groups=torch.tensor([0, 1, 2])):
        together = model.generate(prompts, attention_mask=mask, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for row, theta in enumerate(adapted_copies(model, batch, "full", 1)):
        model.load_state_dict(theta, strict=False)
        one = model.generate(prompts[row : row + 1], attention_mask=mask[row : row + 1], **options)
        assert together[row].tolist() == one[0].tolist()
        model.load_state_dict(before, strict=False)


def test_lora_adapters_of_every_group_equal_materialised_copies(
    lora_model: Build, make_batch: Build
) -> None:
    model, batch = lora_model("llama-tied", rank=3), make_batch("one-each")
    with without_upcasts(model):
        copies = adapted_copies(model, batch, "lora", 1)
        expected = torch.cat(
            [
                functional_call(
                    model, copies[g], kwargs={"input_ids": batch.query_ids[g : g + 1]}
                ).logits
                for g in range(3)
            ]
        )
    update = inner_step(
        model, batch.context_ids, batch.context_mask, inner_lr=INNER_LR, inner_params="lora"
    )
    with update.applied_to(model, groups=torch.arange(3)):
        logits = model(input_ids=batch.query_ids).logits
    assert (logits - expected).norm() <= 1e-6 * expected.norm()


def test_adapters_take_an_inner_step_in_one_launch_per_layer_for_all_groups(
    lora_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = lora_model("llama-tied"), make_batch("grouped")
    shapes, materialise = [], eager_lora.lora_materialise

    def counted(*arguments: Any) -> torch.Tensor:
        after = materialise(*arguments)
        shapes.append(tuple(after.shape))
        return after

    monkeypatch.setattr(eager_lora, "lora_materialise", counted)
    inner_step(model, batch.context_ids, batch.context_mask, batch.context_group, 0.1, 1, "lora")
    layers = [p for n, p in model.named_parameters() if ".lora_" in n]
    assert sorted(shapes) == sorted((3, *layer.shape) for layer in layers)


@pytest.mark.parametrize("name", MODELS)
def test_linear_weights_are_those_of_linear_layers_but_the_head(
    name: str, tiny_model: Build, lora_model: Build
) -> None:
    other = ("norm", "ln_", "emb", "wte", "wpe", "lm_head", "bias", ".lora_")
    for model in (tiny_model(name), lora_model(name)):
        names = {each for each, _ in model.named_parameters()}
        expected = {each for each in names if not any(part in each for part in other)}
        assert set(select_inner(model, "linear")) == expected
    assert len(expected) == len([key for key in names if ".lora_A." in key])


def test_the_update_works_under_no_grad_and_leaves_parameters_and_gradients_alone(
    tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(), make_batch()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        update = inner_step(model, batch.context_ids, batch.context_mask, inner_lr=INNER_LR)
        with update.applied_to(model, groups=torch.arange(3)):
            inside = model(input_ids=batch.query_ids).logits
        outside = model(input_ids=batch.query_ids).logits
    assert not torch.allclose(inside, outside)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_wrong_groups_and_models_are_errors(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model(), make_batch()
    update = inner_step(model, batch.context_ids, batch.context_mask)
    with (
        pytest.raises(ValueError, match="model: expected the one"),
        update.applied_to(tiny_model(), None),
    ):
        pass
    for groups in (torch.tensor([0, 3]), torch.tensor([-1])):
        with (
            pytest.raises(ValueError, match=r"groups: expected indices in \[0, 3\)"),
            update.applied_to(model, groups),
        ):
            pass
    with (
        pytest.raises(ValueError, match="groups: expected a LongTensor"),
        update.applied_to(model, [0]),
    ):
        pass
    with (
        update.applied_to(model, torch.tensor([0, 1])),
        pytest.raises(ValueError, match="one group for each of the 3 rows, got 2"),
    ):
        model(input_ids=batch.query_ids)
    with (
        update.applied_to(model, torch.tensor([0, 1])),
        pytest.raises(ValueError, match="one group for each of the 1 rows, got 2"),
    ):
        model(input_ids=batch.query_ids[:1])
    assert "forward" not in vars(model.model.layers[0].mlp.up_proj)


def test_one_update_is_applied_at_a_time(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model(), make_batch()
    update = inner_step(model, batch.context_ids, batch.context_mask, batch.context_group)
    with update.applied_to(model, batch.query_group):
        before = model(input_ids=batch.query_ids).logits
        with (
            pytest.raises(ValueError, match="one update applied at a time"),
            update.applied_to(model, batch.query_group),
        ):
            pass
        assert torch.equal(model(input_ids=batch.query_ids).logits, before)


def test_adapters_merged_after_the_inner_step_are_an_error(
    lora_model: Build, make_batch: Build
) -> None:
    model, batch = lora_model(), make_batch()
    update = inner_step(
        model, batch.context_ids, batch.context_mask, batch.context_group, inner_params="lora"
    )
    model.merge_adapter()
    with (
        pytest.raises(ValueError, match="merged into"),
        update.applied_to(model, batch.query_group),
    ):
        pass
