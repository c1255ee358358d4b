"""Models as people have them: what is loaded is what was asked for, or one line says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from gdprompt_fast.cli.main import main
from gdprompt_fast.data.people import people_tokenizer
from gdprompt_fast.data.words import word_tokenizer
from gdprompt_fast.errors import UserError
from gdprompt_fast.experiments.context import base_model
from gdprompt_fast.loading import fingerprint_of, load_config, load_model, print_notes
from helpers.model_folders import COMMIT, POINTER, Edit, edit_json, edit_weights, renamed, to_cache

Build = Callable[..., Any]

CPU = torch.device("cpu")


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def save(tiny_model: Build, tmp_path: Path) -> Build:
    """``save(name, **options)``: the folder of a model of MODELS with a tokenizer."""

    def build(name: str, **options: Any) -> Path:
        model = tiny_model(name, torch.float32)
        model.save_pretrained(tmp_path / name, **options)
        word_tokenizer(f"word{index}" for index in range(63)).save_pretrained(tmp_path / name)
        return tmp_path / name

    return build


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the hub, which itself cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def load(name: str | Path, **options: Any) -> Any:
    return load_model(name, "float32", CPU, **options)[0]


def same_weights(model: torch.nn.Module, folder: Path) -> bool:
    own = model.state_dict()
    file = load_file(folder / "model.safetensors")
    return all(torch.equal(own[name], weight) for name, weight in file.items())


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_name_on_the_hub_loads_from_the_cache(
    revision: str | None, model_folder: Path, hub_cache: Path
) -> None:
    to_cache(model_folder, hub_cache, "org/tiny", "main")
    model = load("org/tiny", revision=revision)
    assert same_weights(model, model_folder)
    assert (model.name_or_path, model.config._commit_hash) == ("org/tiny", COMMIT)
    assert load_config("org/tiny", revision).hidden_size == 16
    assert base_model("org/tiny", revision).name == COMMIT


def test_the_bundled_model_has_no_revisions() -> None:
    with pytest.raises(UserError, match="revision: expected none of the bundled model, got 'v1'"):
        base_model("bundled", "v1")


def test_every_command_takes_a_name_and_a_revision(
    model_folder: Path, triples: Path, hub_cache: Path, tmp_path: Path
) -> None:
    to_cache(model_folder, hub_cache, "org/tiny", "v1")
    model = ["--model", "org/tiny", "--revision", "v1"]
    data = ["--data", str(triples), "--device", "cpu"]
    small = ["--steps", "2", "--batch-size", "2", "--answer-tokens", "2"]
    kl = [*model, *data, *small]
    outputs = [["--output", str(tmp_path / name)] for name in ("train", "prepare", "search")]
    assert main(["train", *kl, *outputs[0]]) == 0
    assert main(["prepare", *model, *data, *outputs[1], "--steps", "1", "--examples", "2"]) == 0
    search = ["--grid", "1e-3", "--steps-per-rate", "2", "--test-data", str(triples)]
    assert main(["search-outer-lr", *kl, *outputs[2], *search]) == 0
    assert main(["evaluate", *model, *data, "--answer-tokens", "0"]) == 0
    assert main(["plan", *model, "--batch", "2", "--context", "8", "--query", "16"]) == 0


def test_a_model_that_is_nowhere_is_one_line_with_all_that_was_tried(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for find in (load, load_config):
        with pytest.raises(UserError) as caught:
            find("org/tiny", revision="v2")
        for part in ("got org/tiny at revision 'v2'", str(tmp_path / "org"), str(hub_cache)):
            assert part in str(caught.value)
        assert "HF_HUB_OFFLINE" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.gguf"])
def test_another_model_under_the_same_name_has_another_fingerprint(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"one")
    (tmp_path / "README.md").write_text("of no weight")
    first = fingerprint_of(tmp_path)
    (tmp_path / "README.md").write_text("read again")
    assert fingerprint_of(tmp_path) == first
    (tmp_path / name).write_bytes(b"two")
    assert fingerprint_of(tmp_path) != first


def test_a_folder_has_no_revisions(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"revision: expected none for .*, got 'v1'"):
        load(model_folder, revision="v1")


def test_the_teacher_may_be_on_the_hub(
    model_folder: Path, triples: Path, hub_cache: Path, tmp_path: Path
) -> None:
    to_cache(model_folder, hub_cache, "org/teacher", "main")
    command = ["train", "--model", str(model_folder), "--teacher", "org/teacher", "--steps", "1"]
    command += ["--data", str(triples), "--answer-tokens", "2", "--output", str(tmp_path / "run")]
    assert main(command) == 0


def test_a_teacher_with_another_tokenizer_is_one_line(
    folder: Path, triples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = shutil.copytree(folder, tmp_path / "teacher")
    words = sorted(people_tokenizer().get_vocab())[4:]
    word_tokenizer(words[::-1]).save_pretrained(teacher)
    command = ["train", "--model", str(folder), "--teacher", str(teacher), "--steps", "1"]
    assert main([*command, "--data", str(triples), "--output", str(tmp_path / "run")]) == 2
    assert "error: teacher: expected the tokenizer of the model" in capsys.readouterr().err


ARCHITECTURES = ["llama-tied", "llama-untied", "gpt2-conv1d-positions", "gpt-neox", "xglm"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["whole", "sharded"])
def test_what_transformers_saves_loads(
    name: str, size: str, save: Build, tiny_model: Build
) -> None:
    folder = save(name, max_shard_size=size)
    assert len(list(folder.glob("*.safetensors"))) == 1 or size == "20KB"
    loaded, saved = load(folder), tiny_model(name, torch.float32)
    for key, weight in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_load(sharded: bool, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"1": names[:5], "2": names[5:]} if sharded else {"": names}
    for half, those in halves.items():
        torch.save({name: weights[name] for name in those}, folder / f"pytorch_model{half}.bin")
    if sharded:
        files = {
            name: f"pytorch_model{half}.bin" for half, those in halves.items() for name in those
        }
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": files})
        )
    loaded = load(folder).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def old_buffers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What older versions of transformers saved besides: buffers that are made anew."""
    with_weight = {
        "transformer.h.0.attn.c_attn.weight": {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32),
        },
        "gpt_neox.layers.0.attention.dense.weight": {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 32, 32),
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1),
        },
        "model.layers.0.mlp.up_proj.weight": {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        },
        "model.layers.0.fc1.weight": {"model.embed_positions.weights": torch.ones(34, 32)},
    }
    for name, buffers in with_weight.items():
        weights |= buffers if name in weights else {}
    return weights


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_buffers_of_older_checkpoints_are_no_alarm(name: str, save: Build) -> None:
    folder = save(name)
    edit_weights(folder, old_buffers)
    load(folder)


def test_a_tied_head_may_be_in_the_file_too(save: Build) -> None:
    folder = save("llama-tied")
    edit_weights(folder, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    load(folder)


def test_a_tied_head_may_be_all_that_is_in_the_file(save: Build, tiny_model: Build) -> None:
    folder = save("llama-tied")
    renamed(lambda name: name.replace("model.embed_tokens", "lm_head"))(folder)
    expected = tiny_model("llama-tied", torch.float32).lm_head.weight
    assert torch.equal(load(folder).get_input_embeddings().weight, expected)


def test_names_without_the_prefix_of_the_backbone_load(save: Build, tiny_model: Build) -> None:
    folder = save("gpt2-conv1d-positions")
    edit_weights(folder, old_buffers)
    renamed(lambda name: name.removeprefix("transformer."))(folder)  # as gpt2 itself on the hub
    expected = tiny_model("gpt2-conv1d-positions", torch.float32).state_dict()
    for name, weight in load(folder).state_dict().items():
        assert torch.equal(weight, expected[name]), name


def without(*names: str) -> Edit:
    return lambda folder: edit_weights(
        folder, lambda w: {n: v for n, v in w.items() if not any(part in n for part in names)}
    )


def wider(folder: Path) -> None:
    edit_json("config.json", intermediate_size=32)(folder)


WRONG: dict[str, tuple[Edit, str]] = {
    "compiled": (renamed("_orig_mod.{}".format), "saved from a model of torch.compile"),
    "compiled layers": (
        renamed(lambda name: name.replace("layers.0", "layers.0._orig_mod")),
        "9 missing .* 9 unexpected .* saved from a model of torch.compile",
    ),
    "ddp": (renamed("module.{}".format), "saved from DDP or DataParallel, whose module. is in"),
    "peft": (renamed("base_model.model.{}".format), "saved from a PEFT model"),
    "a missing part": (
        without("layers.1.mlp"),
        r"3 missing \(model.layers.1.mlp.down_proj.weight, .*\): an incomplete checkpoint",
    ),
    "more layers in the file": (
        edit_json("config.json", num_hidden_layers=1),
        r"9 unexpected \(model.layers.1.input_layernorm.weight, .*, …\): more weights than",
    ),
    "fewer layers in the file": (
        edit_json("config.json", num_hidden_layers=3),
        r"9 missing \(model.layers.2.input_layernorm.weight, ",
    ),
    "another size": (
        wider,
        r"6 of another shape \(model.layers.0.mlp.down_proj.weight \[16, 24\] for \[16, 32\], .*"
        "a model of another size",
    ),
    "an untied head": (
        edit_json("config.json", tie_word_embeddings=False),
        r"1 missing \(lm_head.weight\)",
    ),
}


@pytest.mark.parametrize(("edit", "message"), WRONG.values(), ids=WRONG)
def test_weights_that_are_not_the_models_stop(edit: Edit, message: str, folder: Path) -> None:
    edit(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "--allow-missing" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_weights_can_be_meant(
    folder: Path, triples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without("layers.1.mlp")(folder)
    command = ["evaluate", "--model", str(folder), "--data", str(triples), "--answer-tokens", "0"]
    assert main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*command, "--allow-missing"]) == 0
    assert "warning: model: expected the 20 weights of LlamaForCausalLM" in capsys.readouterr().err
    one, two = (load(folder, allow_missing=True) for _ in range(2))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name]), name  # as of a model and its teacher


def test_a_tokenizer_with_more_ids_than_embeddings_stops(folder: Path) -> None:
    tokenizer = word_tokenizer(f"word{index}" for index in range(500))
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="tokenizer: expected ids below the model's vocabulary of"):
        load(folder)


def test_what_may_surprise_of_a_model_and_a_tokenizer_is_said(
    save: Build, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json("config.json", eos_token_id=2)(folder)
    (folder / "generation_config.json").unlink()
    print_notes(*load_model(folder, "float32", CPU))
    assert capsys.readouterr().out == ""
    edit_json("config.json", eos_token_id=[0, 5])(folder)
    print_notes(*load_model(folder, "float32", CPU))
    assert "EOS, with which a response ends, is 2 (</s>), the model's is 0, 5" in (
        capsys.readouterr().out
    )
    larger = save("llama-tied")
    word_tokenizer(["a"]).save_pretrained(larger)
    print_notes(*load_model(larger, "float32", CPU))
    assert "note: the model has 67 embeddings, the tokenizer 5 ids" in capsys.readouterr().out


def test_a_tokenizer_without_eos_is_one_line(
    folder: Path, triples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json("tokenizer_config.json", eos_token=None)(folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert main(["evaluate", "--model", str(folder), "--data", str(triples)]) == 2
    assert "tokenizer: expected an eos_token to end a response with" in capsys.readouterr().err


def test_return_dict_false_loads(folder: Path, triples: Path) -> None:
    edit_json("config.json", return_dict=False)(folder)
    command = ["evaluate", "--model", str(folder), "--data", str(triples), "--answer-tokens", "0"]
    assert main(command) == 0


def test_a_pointer_that_nobody_reads_is_no_alarm(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_text(POINTER)
    assert same_weights(load(folder), folder)


def test_a_folder_of_something_else_and_a_file_are_one_line(tmp_path: Path, folder: Path) -> None:
    for path in (tmp_path, folder / "model.safetensors"):
        with pytest.raises(UserError, match=r"expected a folder with a config.json, an adapter_"):
            load(path)
