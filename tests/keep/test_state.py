"""θ' in a model's own state dict, and in a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from gdprompt_fast import inner_step
from gdprompt_fast.errors import UserError
from gdprompt_fast.keep.record import read_record
from gdprompt_fast.reference.compare import without_upcasts
from helpers.adapted import INNER_LR, adapted_copies
from helpers.kept import OF_THE_CHANGE, distance, learnt, logits, logits_at, with_peft
from helpers.models import MODELS

Build = Callable[..., Any]
FP32 = torch.float32


@pytest.mark.quick
@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_is_theta_prime_of_its_group_by_autograd(
    name: str, steps: int, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(name), make_batch("grouped")
    context = batch.context_ids, batch.context_mask, batch.context_group
    with without_upcasts(model):
        copies = adapted_copies(model, batch, "full", steps)
        update = inner_step(model, *context, inner_lr=INNER_LR, inner_steps=steps)
    for group, expected in enumerate(copies):
        state = update.to_state_dict(group)
        assert state.keys() == model.state_dict().keys()
        for key, value in expected.items():
            change = (value - model.get_parameter(key).detach()).norm()
            rounding = 1e-15 * value.norm()  # all that moves a key's bias, which softmax ignores
            assert (state[key] - value).norm() <= 1e-9 * change + rounding, key


@pytest.mark.parametrize("inner_params", ["full", "linear", "lora"])
def test_a_state_dict_of_a_model_with_adapters_has_its_keys(
    inner_params: str, lora_model: Build, make_batch: Build
) -> None:
    model, batch = lora_model("gpt2-conv1d-positions"), make_batch("grouped")
    context = batch.context_ids, batch.context_mask, batch.context_group
    copies = adapted_copies(model, batch, inner_params, 1)
    update = inner_step(model, *context, inner_lr=INNER_LR, inner_params=inner_params)
    state = update.to_state_dict(1)
    assert state.keys() == model.state_dict().keys()
    for key, value in copies[1].items():
        change = (value - model.get_parameter(key).detach()).norm()
        assert (state[key] - value).norm() <= 1e-9 * change, key


@contextmanager
def nothing_left_on(model: nn.Module) -> Iterator[None]:
    def of(module: nn.Module) -> list[Any]:
        kinds = ("_state_dict_hooks", "_state_dict_pre_hooks", "_forward_hooks")
        return [sorted(vars(module)), *(len(getattr(module, kind)) for kind in kinds)]

    before = [of(module) for module in model.modules()]
    yield
    assert [of(module) for module in model.modules()] == before


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-biases-tied", "gpt2-conv1d-positions"])
def test_inside_one_group_the_model_saves_theta_prime(
    name: str, tiny_model: Build, tmp_path: Path
) -> None:
    model = tiny_model(name, FP32)
    update, before = learnt(model), logits(model)
    expected, plain = logits_at(update, model, 1), dict(model.state_dict())
    with nothing_left_on(model), update.applied_to(model, torch.tensor([1, 1])):
        state = model.state_dict()
        model.save_pretrained(tmp_path / "inside")
        part = model.base_model.state_dict()
    embedding = model.get_input_embeddings().weight
    shared = [value.data_ptr() for key, value in state.items() if value.shape == embedding.shape]
    assert len(shared) == 2 and len(set(shared)) == 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "inside").eval()
    assert distance(logits(theirs), expected, before) <= OF_THE_CHANGE
    copy = tiny_model(name, FP32)
    copy.load_state_dict(state)
    assert distance(logits(copy), expected, before) <= OF_THE_CHANGE
    prefix = model.base_model_prefix
    assert all(torch.equal(value, state[f"{prefix}.{key}"]) for key, value in part.items())
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())


def test_inside_several_groups_the_model_saves_nothing(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("llama-tied", FP32)
    update = learnt(model)
    with nothing_left_on(model), update.applied_to(model, torch.tensor([0, 2])):
        for save in (
            model.state_dict,
            model.model.layers[0].state_dict,
            lambda: model.save_pretrained(tmp_path / "inside"),
        ):
            with pytest.raises(UserError, match=r"groups: expected one group applied .* \[0, 2\]"):
                save()
        assert logits(model).isfinite().all()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("groups", [[0, 2], [0, 0]], ids=str)
def test_inside_the_update_gives_every_group_as_outside(
    groups: list[int], tiny_model: Build, tmp_path: Path
) -> None:
    model = tiny_model("llama-tied", FP32)
    update = learnt(model)
    outside = update.to_state_dict(1)
    with update.applied_to(model, torch.tensor(groups)):
        inside = update.to_state_dict(1)
        update.save_pretrained(tmp_path / "full", 1, form="full")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "full").state_dict()
    for key, value in outside.items():
        assert torch.equal(value, inside[key]) and torch.equal(value, whole[key])


def test_what_is_raised_inside_leaves_nothing_on_the_model(tiny_model: Build) -> None:
    model = tiny_model("llama-tied", FP32)
    update = learnt(model)
    for groups in ([0, 0], [0, 1]):
        with nothing_left_on(model), pytest.raises(ZeroDivisionError):  # noqa: SIM117
            with update.applied_to(model, torch.tensor(groups)):
                raise ZeroDivisionError


def optimizer_step(model: Any) -> None:
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 0.1).step()


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.set_adapter("other"),
    ],
    ids=["step", "merge", "disable", "switch"],
)
def test_another_theta_than_the_update_was_made_of_is_refused(
    change: Callable[[Any], None], lora_model: Build, tmp_path: Path
) -> None:
    model: Any = lora_model("llama-tied").float()
    model.add_adapter("other", model.peft_config["default"])
    update = learnt(model)
    update.save_pretrained(tmp_path / "before")
    change(model)
    for use in (
        lambda: update.save_pretrained(tmp_path / "after"),
        lambda: update.save_pretrained(tmp_path / "after", form="full"),
        lambda: update.to_state_dict(0),
        lambda: logits_at(update, model, 0),
    ):
        with pytest.raises(UserError, match=r"model: expected .*adapters"):
            use()
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize("inner_params", ["full", "linear", "lora"])
def test_inside_one_group_a_model_with_adapters_saves_theta_prime_as_one_adapter(
    inner_params: str, lora_model: Build, tiny_model: Build, tmp_path: Path
) -> None:
    model = lora_model("llama-tied", rank=3).float()
    update, before = learnt(model, inner_params=inner_params), logits(model)
    expected = logits_at(update, model, 1)
    with nothing_left_on(model), update.applied_to(model, torch.tensor([1, 1])):
        model.save_pretrained(str(tmp_path / "inside"))
        state = model.state_dict()
    adapted = with_peft(tiny_model("llama-tied").float(), tmp_path / "inside")
    assert distance(logits(adapted), expected, before) <= OF_THE_CHANGE
    copy = lora_model("llama-tied", rank=3).float()
    copy.load_state_dict(state)
    assert distance(logits(copy), expected, before) <= OF_THE_CHANGE
    with nothing_left_on(model), update.applied_to(model, torch.tensor([0, 1])):
        for part in (model, model.get_base_model()):
            with pytest.raises(UserError, match="groups: expected one group applied"):
                part.save_pretrained(str(tmp_path / "several"))
    assert not (tmp_path / "several").exists()


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_is_theta_prime_with_its_adapters(
    name: str, tiny_model: Build, lora_model: Build, tmp_path: Path
) -> None:
    for kind, model in (("plain", tiny_model(name, FP32)), ("lora", lora_model(name).float())):
        update, before = learnt(model), logits(model)
        expected = logits_at(update, model, 1)
        kept = update.save_pretrained(tmp_path / kind, group=1, form="full")
        whole = AutoModelForCausalLM.from_pretrained(kept.folder).eval()
        assert distance(logits(whole), expected, before) <= OF_THE_CHANGE
        assert type(whole) is type(tiny_model(name))
        assert read_record(kept.folder)["form"] == "full"


def test_a_layer_put_in_by_hand_is_not_kept_as_the_configs(
    tiny_model: Build, tmp_path: Path
) -> None:
    model = tiny_model("llama-tied", FP32)

    class OwnNorm(type(model.model.norm)):  # type: ignore[misc]
        """A folder would not know of it."""

    model.model.norm.__class__ = OwnNorm
    update = learnt(model, inner_params="linear")
    with pytest.raises(UserError, match=r"OwnNorm for the LlamaRMSNorm of model.norm; to_state"):
        update.save_pretrained(tmp_path / "full", form="full")
    assert not (tmp_path / "full").exists() and update.to_state_dict(1)


def test_a_model_in_bf16_keeps_its_dtype(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("llama-tied", torch.bfloat16)
    update = learnt(model)
    assert {value.dtype for value in update.to_state_dict(1).values()} == {torch.bfloat16}
    update.save_pretrained(tmp_path / "full", form="full")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert whole.dtype == torch.bfloat16
    update.save_pretrained(tmp_path / "a")
    expected, before = logits_at(update, model, 0).float(), logits(model).float()
    adapted = with_peft(tiny_model("llama-tied", torch.bfloat16), tmp_path / "a")
    assert distance(logits(adapted).float(), expected, before) < 0.1
