"""Broken model folders: one line that says what is wrong, whatever transformers raises."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from gdprompt_fast.cli.main import main
from gdprompt_fast.errors import UserError
from gdprompt_fast.loading import load_model
from helpers.model_folders import POINTER, Edit, cut, edit_json, edit_weights, renamed, write

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def tokenizer_of_tomorrow(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["type"] = "BPE2"
    (folder / "tokenizer.json").write_text(json.dumps(content))


def a_shard_too_few(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="5KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def pickled_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model": print}, folder / "pytorch_model.bin")


def whole_numbers(folder: Path) -> None:
    edit_weights(folder, lambda weights: {n: w.to(torch.int8) for n, w in weights.items()})


def pickled(change: Callable[[Weights], Any]) -> Edit:
    def edit(folder: Path) -> None:
        torch.save(change(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    return edit


def special_tokens_alone(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in content["added_tokens"]}
    vocabulary = content["model"]["vocab"].items()
    content["model"]["vocab"] = {token: id_ for token, id_ in vocabulary if token in special}
    (folder / "tokenizer.json").write_text(json.dumps(content))


BROKEN: dict[str, tuple[Edit, str]] = {
    "bitsandbytes": (
        edit_json("config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "expected weights that are not quantised, got bitsandbytes",
    ),
    "gptq": (
        edit_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "expected weights that are not quantised, got gptq",
    ),
    "an unknown model_type": (
        edit_json("config.json", model_type="llama9"),
        "a model_type that transformers .* does not know",
    ),
    "another architecture": (
        edit_json("config.json", model_type="gemma", head_dim=16),
        "expected a transformers causal LM .*, got .*GemmaForCausalLM",
    ),
    "no causal LM": (edit_json("config.json", model_type="vit"), "a model that is no causal LM"),
    "a newer tokenizer": (tokenizer_of_tomorrow, "a tokenizer.json that tokenizers .* of a newer"),
    "a pointer for a tokenizer": (
        write("tokenizer.json", POINTER),
        "Git-LFS pointer in .*tokenizer.json: git lfs pull",
    ),
    "a pointer for weights": (
        write("model.safetensors", POINTER),
        "Git-LFS pointer in .*model.safetensors: git lfs pull",
    ),
    "a pointer for a config": (write("config.json", POINTER), "Git-LFS pointer in .*config.json"),
    "weights cut short": (cut("model.safetensors", 500), "model.safetensors, cut short or damaged"),
    "a config cut short": (cut("config.json", 100), "expected JSON in .*config.json, got "),
    "a tokenizer cut short": (
        cut("tokenizer.json", 300),
        "expected JSON in .*tokenizer.json, got ",
    ),
    "a config of words": (
        edit_json("config.json", num_hidden_layers="two"),
        "a config.json with a value that cannot be",
    ),
    "code of its own": (
        edit_json("config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "a model with code of its own, which is not run",
    ),
    "a list for a config": (write("config.json", "[]"), "JSON object in .*config.json, got list"),
    "a shard too few": (
        a_shard_too_few,
        r"shards beside .*, got none of model-00002-of-.* \(1 are",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "expected weights in"),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")] and None,
        "expected a tokenizer in",
    ),
    "code in a pickle": (pickled_code, "a .bin file that is damaged or holds code"),
    "heads that do not divide": (
        edit_json("config.json", num_attention_heads=3),
        "expected a configuration to load in",
    ),
    "weights of whole numbers": (
        whole_numbers,
        "not quantised, got I8 for .*weight in .*model.safetensors",
    ),
    "pickled weights of whole numbers": (
        pickled(lambda weights: {n: w.to(torch.int8) for n, w in weights.items()}),
        "not quantised, got torch.int8 for .*weight in .*pytorch_model.bin",
    ),
    "a pickled list": (pickled(lambda weights: [*weights.values()]), "weights by name in .*a list"),
    "a whole state of training": (
        pickled(lambda weights: {"state_dict": weights, "epoch": 3}),
        r"2 unexpected \(epoch, state_dict\): a whole state of training",
    ),
    "a tokenizer without a vocabulary": (special_tokens_alone, "got special ones alone"),
    "a pointer for a chat template": (
        write("chat_template.jinja", POINTER),
        "Git-LFS pointer in .*chat_template.jinja",
    ),
    "a list for how to generate": (
        write("generation_config.json", "[]"),
        "JSON object in .*generation_config.json, got list",
    ),
    "names under another": (
        renamed(lambda name: f"student.{name}"),
        "student. is before all the names: remove it there",
    ),
    "a padding id without an embedding": (
        edit_json("config.json", pad_token_id=9999),
        "expected a configuration to load in .*adding_idx",
    ),
    "a size that no file holds": (
        edit_json("config.json", hidden_size=1 << 20),
        "expected weights of the [0-9,]+ parameters that .*config.json asks for, got files of",
    ),
}


@pytest.mark.parametrize(("edit", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_one_line_and_exit_code_2(
    edit: Edit, message: str, folder: Path, triples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder)
    with pytest.raises(UserError, match=message):
        load_model(folder, "float32", CPU)
    command = ["evaluate", "--model", str(folder), "--data", str(triples)]
    assert main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=message):
        main([*command, "--debug"])
