"""θ' as an adapter that plain PEFT loads on the fresh base model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gdprompt_fast import inner_step
from gdprompt_fast.artifacts import files
from gdprompt_fast.errors import UserError
from helpers.kept import (
    OF_THE_CHANGE,
    config_in,
    contexts,
    distance,
    learnt,
    logits,
    logits_at,
    tensors_in,
    with_peft,
)
from helpers.killing import Killed
from helpers.model_folders import edit_json
from helpers.models import MODELS

pytest.importorskip("peft", reason="PEFT is an optional dependency")

Build = Callable[..., Any]
FP32 = torch.float32
LORA_TARGETS = {
    "gpt2-conv1d-positions": ["c_attn", "c_fc", "c_proj"],
    "gpt-neox": ["query_key_value", "dense", "dense_h_to_4h"],
    "xglm": ["q_proj", "v_proj", "fc2"],
    "xglm-untied": ["q_proj", "v_proj", "fc2"],
}


def with_trained_adapters(model: Any, name: str) -> Any:
    """PEFT adapters on some layers, far from zero, their scaling not one."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = LORA_TARGETS.get(name, ["q_proj", "v_proj", "down_proj"])
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config).eval()


@pytest.mark.quick
@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize("name", MODELS)
def test_plain_peft_on_a_fresh_base_has_the_logits_of_theta_prime_also_merged(
    name: str, steps: int, tiny_model: Build, tmp_path: Path
) -> None:
    model = tiny_model(name, FP32)
    update, before = learnt(model, steps), logits(model)
    for group in range(3):
        expected = logits_at(update, model, group)
        kept = update.save_pretrained(tmp_path / f"{group}", group)
        assert not any(kept.discarded.values())
        adapted = with_peft(tiny_model(name, FP32), tmp_path / f"{group}")
        assert distance(logits(adapted), expected, before) <= OF_THE_CHANGE
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted), before)
        merged = adapted.merge_and_unload()
        assert distance(logits(merged), expected, before) <= OF_THE_CHANGE


@pytest.mark.parametrize("inner_params", ["full", "linear", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_trained_adapters_leave_with_the_update_in_one(
    name: str, inner_params: str, tiny_model: Build, tmp_path: Path
) -> None:
    model = with_trained_adapters(tiny_model(name, FP32), name)
    update, before = learnt(model, 2, inner_params), logits(model)
    expected = logits_at(update, model, 1)
    update.save_pretrained(tmp_path / "one", group=1)
    adapted = with_peft(tiny_model(name, FP32), tmp_path / "one")
    assert distance(logits(adapted), expected, before) <= OF_THE_CHANGE
    assert distance(logits(adapted.merge_and_unload()), expected, before) <= OF_THE_CHANGE


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gpt2-conv1d-positions"])
def test_several_adapters_stand_side_by_side_on_one_base(
    name: str, tiny_model: Build, tmp_path: Path
) -> None:
    model = tiny_model(name, FP32)
    update, before = learnt(model), logits(model)
    folders = [tmp_path / f"{group}" for group in range(3)]
    for group, folder in enumerate(folders):
        update.save_pretrained(folder, group)
    adapted = with_peft(tiny_model(name, FP32), *folders)
    for group in (2, 0, 1, 0):
        adapted.set_adapter(f"{group}")
        expected = logits_at(update, model, group)
        assert distance(logits(adapted), expected, before) <= OF_THE_CHANGE


def test_modules_that_peft_trains_whole_leave_too(tiny_model: Build, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    whole = ["model.norm", "up_proj"]
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=whole, init_lora_weights=False)
    model = get_peft_model(tiny_model("llama-untied", FP32), config).eval()
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data += 0.1
    for inner_params in ("full", "linear", "lora"):
        update = learnt(model, inner_params=inner_params)
        expected, before = logits_at(update, model, 1), logits(model)
        update.save_pretrained(tmp_path / inner_params, 1)
        adapted = with_peft(tiny_model("llama-untied", FP32), tmp_path / inner_params)
        assert distance(logits(adapted), expected, before) <= OF_THE_CHANGE
        assert "model.layers.0.mlp.up_proj" in config_in(tmp_path / inner_params)["modules_to_save"]


def test_a_bias_that_an_adapter_trains_leaves_where_the_layer_has_one(
    tiny_model: Build, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = dict(
        lora_bias=True, init_lora_weights=False, target_modules=["q_proj"]
    )
    model = get_peft_model(tiny_model("llama-biases", FP32), LoraConfig(**options)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            parameter.data += 0.1
    update = learnt(model, inner_params="linear")
    expected, before = logits_at(update, model, 0), logits(model)
    update.save_pretrained(tmp_path / "a")
    adapted = with_peft(tiny_model("llama-biases", FP32), tmp_path / "a")
    assert distance(logits(adapted), expected, before) <= OF_THE_CHANGE
    with pytest.warns(UserWarning, match="has no bias"):
        model = get_peft_model(tiny_model("llama-untied", FP32), LoraConfig(**options)).eval()
    with pytest.raises(UserError, match=r"adapters without a bias .* got model.layers.0.self_attn"):
        learnt(model, inner_params="linear").save_pretrained(tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [{"lora_alpha": 48}, {"alpha_pattern": {"lm_head": 5}}, {"use_rslora": True}],
    ids=str,
)
def test_another_scaling_would_be_found(
    change: dict[str, Any], tiny_model: Build, tmp_path: Path
) -> None:
    model = tiny_model("llama-untied", FP32)
    update, before = learnt(model), logits(model)
    update.save_pretrained(tmp_path / "a")
    edit_json("adapter_config.json", **change)(tmp_path / "a")
    adapted = with_peft(tiny_model("llama-untied", FP32), tmp_path / "a")
    expected = logits_at(update, model, 0)
    assert distance(logits(adapted), expected, before) > 100 * OF_THE_CHANGE


def test_a_rank_too_small_discards_the_energy_that_it_says(
    tiny_model: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama-untied", FP32)
    update, before = learnt(model), logits(model)
    kept = update.save_pretrained(tmp_path / "a", rank=2)
    state, tensors = update.to_state_dict(), tensors_in(tmp_path / "a")
    assert set(kept.ranks.values()) == {2} == {config_in(tmp_path / "a")["r"]}
    for name, discarded in kept.discarded.items():
        change = state[f"{name}.weight"] - model.get_parameter(f"{name}.weight").detach()
        if name == "model.embed_tokens":
            a, b = (tensors[f"base_model.model.{name}.lora_embedding_{n}"] for n in "AB")
            product = (b @ a).T
        else:
            a, b = (tensors[f"base_model.model.{name}.lora_{n}.weight"] for n in "AB")
            product = b @ a
        lost = (change - product).square().sum() / change.square().sum()
        assert discarded == pytest.approx(float(lost), rel=1e-3, abs=1e-6)
        for text in (capsys_text := str(kept), (tmp_path / "a" / "README.md").read_text()):
            assert f"{discarded:.4%}" in text
    assert capsys_text in capsys.readouterr().out
    assert max(kept.discarded.values()) > 0.01
    adapted = with_peft(tiny_model("llama-untied", FP32), tmp_path / "a")
    expected = logits_at(update, model, 0)
    assert 0.01 < distance(logits(adapted), expected, before) < 1


@pytest.mark.parametrize("name", MODELS)
def test_linear_weights_alone_take_no_copies(name: str, tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model(name, FP32)
    update, before = learnt(model, inner_params="linear"), logits(model)
    kept = update.save_pretrained(tmp_path / "a", for_vllm=True)
    config, tensors = config_in(tmp_path / "a"), tensors_in(tmp_path / "a")
    assert kept.whole == () and config["modules_to_save"] is None and config["bias"] == "none"
    assert config["r"] == config["lora_alpha"] == 8
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    for key, tensor in tensors.items():
        assert key.startswith("base_model.model.") and "embed" not in key and "lm_head" not in key
        assert key.endswith((".lora_A.weight", ".lora_B.weight"))
        assert tensor.shape["lora_B" in key] == 8
    adapted = with_peft(tiny_model(name, FP32), tmp_path / "a")
    expected = logits_at(update, model, 0)
    assert distance(logits(adapted), expected, before) <= OF_THE_CHANGE
    assert distance(logits(adapted.merge_and_unload()), expected, before) <= OF_THE_CHANGE


@pytest.mark.parametrize(("rank", "served"), [(3, 8), (9, 16), (257, 320), (None, 32)])
def test_for_vllm_the_rank_is_the_next_that_it_has_room_for(
    rank: int | None, served: int, tiny_model: Build, tmp_path: Path
) -> None:
    update = learnt(tiny_model("llama-tied", FP32), 3, "linear")  # ranks up to 3 × 16, of 32
    kept = update.save_pretrained(tmp_path / "a", group=1, rank=rank, for_vllm=True)
    assert set(kept.ranks.values()) == {min(served, 32) if rank != 257 else 32}


def test_for_vllm_an_update_of_more_than_linear_layers_is_refused(
    tiny_model: Build, tmp_path: Path
) -> None:
    update = learnt(tiny_model("llama-tied", FP32))
    with pytest.raises(
        UserError, match=r'for_vllm: .* \(inner_params="linear"\), got one that mov'
    ):
        update.save_pretrained(tmp_path / "a", for_vllm=True)
    assert list(tmp_path.iterdir()) == []


def test_layers_get_their_own_ranks(tiny_model: Build, tmp_path: Path) -> None:
    """Keys and values of 16 outputs have no higher rank, the others that of the tokens."""
    update = learnt(tiny_model("llama-untied", FP32), 2, "linear")
    kept = update.save_pretrained(tmp_path / "a", group=1)
    assert len(set(kept.ranks.values())) > 1
    config = config_in(tmp_path / "a")
    assert config["rank_pattern"] == config["alpha_pattern"]
    ranks = {n: config["rank_pattern"].get(n, config["r"]) for n in kept.ranks}
    assert ranks == kept.ranks
    assert config["target_modules"] == sorted({name.rpartition(".")[2] for name in kept.ranks})


def test_layers_chosen_by_name_are_named_in_full(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("llama-untied", FP32)
    update = learnt(model, inner_params=lambda name, _: "layers.1.mlp.up_proj" in name)
    expected, before = logits_at(update, model, 0), logits(model)
    update.save_pretrained(tmp_path / "a")
    assert config_in(tmp_path / "a")["target_modules"] == ["model.layers.1.mlp.up_proj"]
    adapted = with_peft(tiny_model("llama-untied", FP32), tmp_path / "a")
    assert distance(logits(adapted), expected, before) <= OF_THE_CHANGE


def test_an_update_that_no_adapter_holds_is_refused(tiny_model: Build, tmp_path: Path) -> None:
    update = learnt(tiny_model("llama-tied", FP32), inner_params=lambda name, _: "norm" in name)
    with pytest.raises(UserError, match='form: expected "full" for an update that changes no'):
        update.save_pretrained(tmp_path / "a")
    update.save_pretrained(tmp_path / "a", form="full")


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"form": "full"}], ids=str)
def test_an_update_that_is_not_finite_is_not_kept(
    options: dict[str, Any], tiny_model: Build, tmp_path: Path
) -> None:
    update = inner_step(tiny_model("llama-tied", FP32), *contexts(), inner_lr=3e38)
    with pytest.raises(FloatingPointError, match="inner_lr: expected a rate at which θ' is finite"):
        update.save_pretrained(tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"group": 3}, r"group: expected an integer in \[0, 3\), got 3"),
        ({"group": True}, "group: expected an integer"),
        ({"rank": 0}, "rank: expected an integer >= 1 or None, got 0"),
        ({"rank": 4.0}, "rank: expected an integer"),
        ({"rank": 513, "for_vllm": True}, "rank: expected an integer >= 1 <= 512 or None, got 513"),
        ({"texts": "one"}, "texts: expected a sequence of texts, got the text 'one'"),
        ({"form": "dora"}, 'form: expected "lora" or "full", got \'dora\''),
        ({"form": "full", "rank": 2}, 'rank: expected none with form "full"'),
        ({"form": "full", "for_vllm": True}, 'for_vllm: expected none with form "full"'),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_named(
    options: dict[str, Any], expected: str, tiny_model: Build, tmp_path: Path
) -> None:
    update = learnt(tiny_model("llama-tied", FP32))
    with pytest.raises(UserError, match=expected):
        update.save_pretrained(tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["lora", "full"])
def test_nothing_is_written_over_and_nothing_by_halves(
    form: str, tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, theirs = learnt(tiny_model("llama-tied", FP32)), tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"folder: expected a new or empty folder, got {theirs}"):
        update.save_pretrained(theirs, form=form)
    assert [path.name for path in theirs.iterdir()] == ["notes.txt"]

    def killed(_: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files, "_to_disk", killed)
        update.save_pretrained(tmp_path / "new", form=form)
    assert not (tmp_path / "new").exists()
    update.save_pretrained(tmp_path / "new", form=form)
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "new"}


def test_the_card_says_how_it_was_learnt(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("llama-tied", FP32)
    model.name_or_path = "some/base"
    learnt(model, 2).save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\nbase_model: some/base\nlibrary_name: peft\n")
    assert "2 gradient steps with η = 0.1" in card and "`embed_tokens`" in card
    assert config_in(tmp_path / "a")["base_model_name_or_path"] == "some/base"
