"""Adapters as the θ' of groups: what was kept comes back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdprompt_fast import InnerUpdate
from gdprompt_fast.errors import UserError
from gdprompt_fast.keep.record import read_record
from helpers.kept import OF_THE_CHANGE, distance, learnt, logits, logits_at, queries, tensors_in
from helpers.model_folders import cut, edit_json, write
from helpers.models import MODELS

Build = Callable[..., Any]
FP32 = torch.float32


def kept(update: InnerUpdate, folder: Path) -> list[Path]:
    """The adapters of all groups."""
    folders = [folder / f"{group}" for group in range(update.groups)]
    for group, each in enumerate(folders):
        update.save_pretrained(each, group)
    return folders


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_several_groups_are_applied_at_once_and_kept_again(
    name: str, tiny_model: Build, tmp_path: Path
) -> None:
    model = tiny_model(name, FP32)
    update, before = learnt(model, 2), logits(model)
    rows = torch.tensor([2, 0])
    with update.applied_to(model, rows):
        expected = logits(model)
    loaded = InnerUpdate.from_pretrained(kept(update, tmp_path / "once"), model)
    assert loaded.groups == 3
    with loaded.applied_to(model, rows):
        assert distance(logits(model), expected, before) <= OF_THE_CHANGE
    again = kept(loaded, tmp_path / "again")
    for group, folder in enumerate(again):
        one = InnerUpdate.from_pretrained(folder, model)
        want = logits_at(update, model, group)
        assert distance(logits_at(one, model, 0), want, before) <= OF_THE_CHANGE
        assert tensors_in(folder).keys() == tensors_in(tmp_path / "once" / f"{group}").keys()
    state = loaded.to_state_dict(1)
    copy = tiny_model(name, FP32)
    copy.load_state_dict(state)
    assert distance(logits(copy), logits_at(update, model, 1), before) <= OF_THE_CHANGE


def test_generation_equals_that_of_the_update(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("llama-tied", FP32)
    update, rows = learnt(model), torch.tensor([2, 0])
    loaded = InnerUpdate.from_pretrained(kept(update, tmp_path), model)
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    answers = []
    for each in (update, loaded):
        with each.applied_to(model, rows):
            answers.append(model.generate(queries(), **options).tolist())
    assert answers[0] == answers[1]


def test_a_model_with_adapters_comes_back_on_its_base(
    lora_model: Build, tiny_model: Build, tmp_path: Path
) -> None:
    model = lora_model("llama-untied").float()
    update, before = learnt(model), logits(model)
    expected = logits_at(update, model, 1)
    folders, base = kept(update, tmp_path), tiny_model("llama-untied").float()
    loaded = InnerUpdate.from_pretrained(folders, base)
    assert distance(logits_at(loaded, base, 1), expected, before) <= OF_THE_CHANGE
    with pytest.raises(UserError, match="model: expected the base of the adapters without any"):
        InnerUpdate.from_pretrained(folders, model)


def test_adapters_of_different_layers_and_ranks_go_together(
    tiny_model: Build, tmp_path: Path
) -> None:
    model = tiny_model("qwen2-biases-tied", FP32)
    before, expected, folders = logits(model), [], []
    for inner_params, rank in (("full", None), ("linear", None), ("linear", 3), ("full", 5)):
        update = learnt(model, inner_params=inner_params)
        folders.append(tmp_path / f"{inner_params}-{rank}")
        update.save_pretrained(folders[-1], 1, rank=rank)
        one = InnerUpdate.from_pretrained(folders[-1], model)
        expected.append(logits_at(one, model, 0))
    loaded = InnerUpdate.from_pretrained(folders, model)
    for group, want in enumerate(expected):
        assert distance(logits_at(loaded, model, group), want, before) <= OF_THE_CHANGE


def test_how_it_was_learnt_comes_back(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("llama-tied", FP32)
    learnt(model).save_pretrained(tmp_path / "a", texts=["one"])
    learnt(model, 2).save_pretrained(tmp_path / "b", 1, texts=["two", "three"])
    update = InnerUpdate.from_pretrained([tmp_path / "a", tmp_path / "b"], model)
    assert [each.texts for each in update.learnt] == [("one",), ("two", "three")]
    assert [(each.inner_lr, each.inner_steps) for each in update.learnt] == [(0.1, 1), (0.1, 2)]
    update.save_pretrained(tmp_path / "c", 1)
    assert read_record(tmp_path / "c")["texts"] == ["two", "three"]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda folder: (folder / "gdprompt.json").unlink(), "without a gdprompt.json"),
        (write("gdprompt.json", "{"), "expected JSON as it was written"),
        (edit_json("gdprompt.json", written_by="me"), "expected the mark of"),
        (edit_json("gdprompt.json", inner_steps="one"), "inner_steps, inner_params, texts as they"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter to load in"),
        (cut("adapter_model.safetensors", 100), "adapter to load in"),
    ],
)
def test_folders_that_are_not_whole_are_named(
    edit: Callable[[Path], Any], expected: str, tiny_model: Build, tmp_path: Path
) -> None:
    model = tiny_model("llama-tied", FP32)
    learnt(model).save_pretrained(tmp_path / "a")
    edit(tmp_path / "a")
    with pytest.raises(UserError, match=expected):
        InnerUpdate.from_pretrained(tmp_path / "a", model)


def test_adapters_of_another_model_and_whole_models_are_named(
    tiny_model: Build, tmp_path: Path
) -> None:
    model = tiny_model("llama-untied", FP32)
    update = learnt(model)
    update.save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="folder: expected an adapter of this model"):
        InnerUpdate.from_pretrained(tmp_path / "a", tiny_model("gpt-neox", FP32))
    with pytest.raises(UserError, match="folder: expected a folder or several, got none"):
        InnerUpdate.from_pretrained([], model)
    update.save_pretrained(tmp_path / "full", form="full")
    with pytest.raises(UserError, match="folder: expected an adapter, got the whole model"):
        InnerUpdate.from_pretrained(tmp_path / "full", model)
    path = tmp_path / "a" / "adapter_model.safetensors"
    matrices = {key: value for key, value in load_file(path).items() if value.dim() > 1}
    save_file({key: value[:, :-1].clone() for key, value in matrices.items()}, path)
    with pytest.raises(UserError, match=r"folder: expected parts of a layer \(\d+, \d+\) for"):
        InnerUpdate.from_pretrained(tmp_path / "a", model)


def test_an_adapter_of_layers_of_another_size_is_named(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("llama-untied", FP32)
    learnt(model, inner_params="linear").save_pretrained(tmp_path / "a")
    config = copy.deepcopy(model.config)
    config.intermediate_size += 8
    wider = type(model)(config).eval()
    with pytest.raises(UserError, match=r"folder: expected parts of a layer .* for .*mlp\."):
        InnerUpdate.from_pretrained(tmp_path / "a", wider)
