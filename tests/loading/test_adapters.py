"""Adapters find their base from any folder, and are all there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from gdprompt_fast import MetaBatch, fast_meta_step, reference_meta_step
from gdprompt_fast.cli.main import main
from gdprompt_fast.data.people import people_tokenizer
from gdprompt_fast.errors import UserError
from gdprompt_fast.loading import add_lora, load_model
from gdprompt_fast.models.inner_params import select_inner
from gdprompt_fast.training.checkpoint import load_weights, save_model
from helpers.model_folders import COMMIT, to_cache

peft = pytest.importorskip("peft", reason="PEFT is an optional dependency")

Build = Callable[..., Any]
CPU = torch.device("cpu")


def with_adapters(model: Any) -> Any:
    """The model with adapters that are not zero."""
    adapted = add_lora(model, rank=2, seed=0)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.3)
    return adapted


@pytest.fixture
def home(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base in ``models/base`` and adapters of it in ``adapters``."""
    home = tmp_path / "home"
    shutil.copytree(model_folder, home / "models" / "base")
    monkeypatch.chdir(home)
    model, tokenizer = load_model("models/base", "float32", CPU)
    save_model(with_adapters(model), tokenizer, home / "adapters")
    return home


def settings(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def change_settings(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(settings(folder) | changes))


def change_weights(folder: Path, rename: Callable[[str], str | None]) -> None:
    path = folder / "adapter_model.safetensors"
    weights = {new: value for name, value in load_file(path).items() if (new := rename(name))}
    path.unlink()
    save_file(weights, path)


def load(folder: str | Path, **options: Any) -> Any:
    return load_model(folder, "float32", CPU, **options)[0]


def same_adapters(model: Any, folder: Path) -> bool:
    file = load_file(folder / "adapter_model.safetensors")
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return own.keys() == file.keys() and all(torch.equal(own[n], w) for n, w in file.items())


def test_adapters_are_saved_with_the_absolute_path_of_their_base(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings(home / "adapters")["base_model_name_or_path"] == str(home / "models" / "base")
    monkeypatch.chdir(tmp_path)
    model = load(home / "adapters")
    assert same_adapters(model, home / "adapters")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }


def test_the_relative_base_of_a_model_made_elsewhere_is_saved_absolute_too(home: Path) -> None:
    model = LlamaForCausalLM.from_pretrained("models/base")
    save_model(with_adapters(model), people_tokenizer(), home / "new")
    assert settings(home / "new")["base_model_name_or_path"] == str(home / "models" / "base")


def test_a_relative_base_is_tried_from_here_and_from_the_adapters(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_settings(home / "adapters", base_model_name_or_path="models/base")
    assert same_adapters(load(home / "adapters"), home / "adapters")
    change_settings(home / "adapters", base_model_name_or_path="../models/base")
    monkeypatch.chdir(tmp_path)
    model = load(home / "adapters")
    assert same_adapters(model, home / "adapters")
    save_model(model, people_tokenizer(), tmp_path / "again")
    base = settings(tmp_path / "again")["base_model_name_or_path"]
    assert Path(base).resolve() == home / "models" / "base"


def test_a_base_that_is_nowhere_is_one_line_with_all_places(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    change_settings(home / "adapters", base_model_name_or_path="models/gone")
    with pytest.raises(UserError) as caught:
        load("adapters")
    places = (home / "models" / "gone", home / "adapters" / "models" / "gone")
    for part in (*map(str, places), constants.HF_HUB_CACHE, "adapter_config.json"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    change_settings(home / "adapters", base_model_name_or_path=None)
    with pytest.raises(UserError, match="expected a base_model_name_or_path in"):
        load("adapters")


def test_a_base_on_the_hub_is_saved_with_its_commit(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    to_cache(home / "models" / "base", tmp_path / "hub", "org/tiny", "v1")
    model, tokenizer = load_model("org/tiny", "float32", CPU, revision="v1")
    save_model(with_adapters(model), tokenizer, home / "new")
    saved = settings(home / "new")
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/tiny", COMMIT)
    assert same_adapters(load(home / "new"), home / "new")


def test_adapters_and_their_base_may_both_be_on_the_hub(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    change_settings(home / "adapters", base_model_name_or_path="org/tiny")
    to_cache(home / "models" / "base", tmp_path / "hub", "org/tiny", "main")
    to_cache(home / "adapters", tmp_path / "hub", "org/adapters", "main")
    assert same_adapters(load("org/adapters"), home / "adapters")


def test_a_damaged_checkpoint_is_one_line(home: Path) -> None:
    path = home / "adapters" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="expected a checkpoint to load in"):
        load_weights(with_adapters(load("models/base")), home / "adapters")


def test_adapters_without_a_tokenizer_take_that_of_their_base(home: Path) -> None:
    for path in (home / "adapters").glob("*token*"):
        path.unlink()
    _, tokenizer = load_model(home / "adapters", "float32", CPU)
    assert tokenizer.get_vocab() == people_tokenizer().get_vocab()


WRONG: dict[str, tuple[Callable[[str], str | None], str]] = {
    "compiled": (
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        r"28 missing .* 28 unexpected .* saved from a model of torch.compile",
    ),
    "missing": (
        lambda name: None if "layers.1" in name else name,
        r"14 missing \(base_model.model.model.layers.1.* an incomplete checkpoint",
    ),
    "with the adapter's own name": (
        lambda name: name.replace(".weight", ".default.weight"),
        r"28 missing .* 28 unexpected .* the state_dict\(\) of a PEFT model",
    ),
    "of other names": (
        lambda name: name.replace("self_attn", "attention"),
        r"16 missing .* 16 unexpected .* another architecture",
    ),
}


@pytest.mark.parametrize(("rename", "message"), WRONG.values(), ids=WRONG)
def test_adapters_that_are_not_the_models_stop(
    rename: Callable[[str], str | None], message: str, home: Path
) -> None:
    change_weights(home / "adapters", rename)
    with pytest.raises(UserError, match=message):
        load("adapters")
    model = with_adapters(load("models/base"))
    with pytest.raises(UserError, match=message):
        load_weights(model, home / "adapters")
    load("adapters", allow_missing=True)


def test_more_adapters_than_the_settings_say_are_no_merged_model(home: Path) -> None:
    change_settings(home / "adapters", target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"24 unexpected .*: more weights than its config says"):
        load("adapters")


def test_the_base_of_adapters_is_an_input(home: Path, triples: Path) -> None:
    base = home / "models" / "base"
    before = {path: path.read_bytes() for path in base.iterdir()}
    command = ["--model", "adapters", "--data", str(triples), "--overwrite"]
    assert main(["prepare", *command, "--output", str(base)]) == 2
    assert main(["train", *command, "--output", "models"]) == 2
    assert main(["evaluate", *command, "--results", str(base / "tokenizer.json")]) == 2
    assert {path: path.read_bytes() for path in base.iterdir()} == before


def test_adapters_of_another_rank_stop(home: Path) -> None:
    change_settings(home / "adapters", r=3)
    with pytest.raises(UserError, match=r"28 of another shape .* \[2, 16\] for \[3, 16\]"):
        load("adapters")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "NOVEL"}, "expected adapters to load in"),
        ({"task_type": "SEQ_CLS"}, "expected adapters of a causal LM, got task_type 'SEQ_CLS'"),
        ({"use_dora": True}, "plain LoRA on linear layers"),
        ({"target_modules": ["no_such_layer"]}, "expected adapters to load in .*no_such_layer"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path in .*, got 5"),
        ({"base_model_name_or_path": "adapters"}, "expected a base without adapters"),
    ],
    ids=str,
)
def test_settings_of_adapters_that_cannot_be_are_one_line(
    changes: dict[str, Any], message: str, home: Path
) -> None:
    change_settings(home / "adapters", **changes)
    with pytest.raises(UserError, match=message) as caught:
        load("adapters")
    assert "\n" not in str(caught.value)


def test_adapters_with_added_tokens_load(home: Path) -> None:
    model, tokenizer = load_model("models/base", "float32", CPU)
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(home / "new", save_embedding_layers=True)
    tokenizer.save_pretrained(home / "new")
    embedding = load(home / "new").get_input_embeddings().weight
    assert torch.equal(embedding, model.get_input_embeddings().weight)


def test_adapters_of_any_causal_task_load(home: Path) -> None:
    change_settings(home / "adapters", task_type=None)
    assert same_adapters(load("adapters"), home / "adapters")


def test_an_idle_second_adapter_is_not_moved(
    lora_model: Build, make_batch: Callable[[], MetaBatch]
) -> None:
    model = lora_model("llama-tied")
    model.add_adapter("idle", peft.LoraConfig(r=2, target_modules="all-linear"))
    selected = select_inner(model, "lora")
    assert selected and all(".default." in name for name in selected)
    out = fast_meta_step(model, make_batch(), 0.1, inner_params="lora", objective="gold")
    expected = reference_meta_step(
        lora_model("llama-tied"), make_batch(), 0.1, inner_params="lora", objective="gold"
    )
    torch.testing.assert_close(out.outer_loss, expected.outer_loss)
