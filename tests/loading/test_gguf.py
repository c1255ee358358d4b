"""GGUF files load, and what is trained of them saves as any other model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from gdprompt_fast.errors import UserError
from gdprompt_fast.loading import add_lora, load_model
from gdprompt_fast.training.checkpoint import save_model

gguf = pytest.importorskip("gguf", reason="gguf is an optional dependency")

CPU = torch.device("cpu")
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_gguf(model: Any, path: Path, omit: str = "nothing") -> None:
    """A tied Llama as llama.cpp's converter writes it, with rows of q and k in pairs."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(2)
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = weight.view(-1, 2, config.head_dim // 2, weight.shape[1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if omit not in name:
            writer.add_tensor(name, weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A folder with one GGUF file and a tokenizer."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    for path in model_folder.glob("tokenizer*"):
        shutil.copy(path, folder)
    write_gguf(LlamaForCausalLM.from_pretrained(model_folder), folder / "tiny-f32.gguf")
    return folder


@pytest.mark.parametrize("name", [".", "tiny-f32.gguf"], ids=["folder", "file"])
def test_a_gguf_file_loads_and_is_saved_as_an_ordinary_model(
    name: str, folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_model(folder / name, "float32", CPU)
    save_model(model, tokenizer, tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved", "float32", CPU)
    expected = LlamaForCausalLM.from_pretrained(model_folder).state_dict()
    for loaded in (model, again):
        for weight_name, weight in loaded.state_dict().items():
            assert torch.equal(weight, expected[weight_name]), weight_name


def test_adapters_of_a_gguf_file_find_it(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT is an optional dependency")
    for name in (folder, folder / "tiny-f32.gguf"):
        model, tokenizer = load_model(name, "float32", CPU)
        save_model(add_lora(model, 2, 0), tokenizer, tmp_path / "adapters")
        load_model(tmp_path / "adapters", "float32", CPU)


def test_of_several_gguf_files_one_must_be_named(folder: Path) -> None:
    shutil.copy(folder / "tiny-f32.gguf", folder / "tiny-q8.gguf")
    with pytest.raises(UserError, match=r"one GGUF file in .*, got tiny-f32.gguf, tiny-q8.gguf"):
        load_model(folder, "float32", CPU)
    load_model(folder / "tiny-q8.gguf", "float32", CPU)


def test_a_gguf_file_without_all_weights_stops(folder: Path, model_folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(model_folder)
    write_gguf(model, folder / "tiny-f32.gguf", omit="ffn_up")
    with pytest.raises(UserError, match=r"2 missing \(model.layers.0.mlp.up_proj.weight"):
        load_model(folder, "float32", CPU)


def test_a_gguf_file_cut_short_is_one_line(folder: Path) -> None:
    path = folder / "tiny-f32.gguf"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="expected a configuration to load in"):
        load_model(folder, "float32", CPU)
