"""Models, tokenizers and data as the command line names them, checked before any long work."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from .architecture import check_model
from .data import Example
from .errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """``auto``: the first CUDA device if there is one, else the CPU.

    Raises:
        ValueError: if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: expected one that is there, got {name!r} ({error})") from None


def load_model(
    folder: Path, dtype: str, device: torch.device
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer from a transformers model folder, or one of PEFT adapters.

    Raises:
        ValueError: if there is no such folder, or the engine does not know the architecture.
    """
    adapters = (folder / "adapter_config.json").is_file()
    if not adapters and not (folder / "config.json").is_file():
        raise UserError(f"model: expected a folder with a config.json, got {folder}")
    try:
        model = _load_adapters(folder, dtype) if adapters else _load_base(folder, dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"model: expected a model to load in {folder}, got {reason}") from error
    check_model(model.eval())
    return model.to(device), tokenizer


def load_config(name: str) -> PreTrainedConfig:
    """The configuration in a config.json, in a model folder, or of a model on the Hugging Face hub.

    Raises:
        ValueError: if there is none, or the hub cannot be reached.
    """
    path = Path(name)
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix != ".json"
    if not (path.is_file() or (path / "config.json").is_file() or on_hub):
        raise UserError(
            "model: expected a config.json, a folder with one or the name of a model on the hub, "
            f"got {name}"
        )
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers has errors of many types for a faulty configuration
        reason = str(error).strip().partition("\n")[0][:300]
        raise UserError(f"model: expected a configuration at {name}, got {reason}") from error


def _load_base(folder: Path, dtype: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])


def _load_adapters(folder: Path, dtype: str) -> nn.Module:
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], is_trainable=True)


def add_lora(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """``model`` with trainable adapters of this rank on every linear layer but the head.

    Raises:
        ValueError: if the rank is not positive, or PEFT is not installed.
    """
    if rank < 1:
        raise UserError(f"lora_rank: expected an integer >= 0, got {rank}")
    if hasattr(model, "peft_config"):
        raise UserError("lora_rank: expected 0 with a model that has adapters already")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("lora_rank: expected PEFT to be installed (pip install peft)") from None
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def check_vocabulary(examples: Iterable[Example], model: nn.Module) -> None:
    """The model has an embedding for every token of the examples."""
    vocabulary = vocabulary_size(model)
    largest = max(max(*e.context, *e.prompt, *e.response) for e in examples)
    if largest >= vocabulary:
        raise UserError(
            f"tokenizer: expected ids below the model's vocabulary of {vocabulary}, got {largest}"
        )


def check_same_vocabulary(teacher: nn.Module, model: nn.Module) -> None:
    """The teacher's predictions are over the model's own tokens."""
    if vocabulary_size(teacher) != vocabulary_size(model):
        raise UserError(
            f"teacher: expected the model's vocabulary of {vocabulary_size(model)}, "
            f"got {vocabulary_size(teacher)}"
        )


def vocabulary_size(model: nn.Module) -> int:
    """The number of rows of the embedding, V."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def positions(model: nn.Module) -> int:
    """The longest row that the model has positions for."""
    return int(model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]


def room_before_answer(model: nn.Module, answer_tokens: int) -> int:
    """The longest row after which the model has positions for a generated answer.

    Raises:
        ValueError: if that is no row at all.
    """
    room = positions(model) - answer_tokens
    if room < 2:
        raise UserError(
            f"answer_tokens: expected fewer than the model's positions, got {answer_tokens}"
        )
    return room
