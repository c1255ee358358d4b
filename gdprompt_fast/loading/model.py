"""The one place where models and tokenizers are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..distributed.group import local_rank
from ..errors import UserError
from ..models.architecture import causal_lm, check_model
from .adapters import load_adapters
from .causes import one_line_errors
from .files import (
    check_files,
    check_not_quantised,
    gguf_file,
    has_tokenizer,
    read_settings,
    weight_files,
)
from .find import ADAPTER_CONFIG_FILE, CONFIG_FILE, FoundModel, find_config, find_model
from .fit import check_tokenizer
from .weights import load_base, the_same_at_random

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PER_BYTE = 8  # no format holds more parameters in a byte


def choose_device(name: str) -> torch.device:
    """``auto``: a CUDA device if there is one, else the CPU. Of several processes on a machine each
    has the CUDA device of its number there.

    Raises:
        ValueError: if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank() is not None:
        name = f"cuda:{local_rank()}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: expected one that is there, got {name!r} ({error})") from None


def load_model(
    name: str | Path,
    dtype: str,
    device: torch.device,
    revision: str | None = None,
    allow_missing: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal LM, or PEFT adapters on one, and its tokenizer.

    Args:
        name: a folder (safetensors, .bin or GGUF; or adapters), a GGUF file, or a name on the
            Hugging Face hub.
        dtype: a key of ``DTYPES``, of the weights.
        device: where it is to run.
        revision: a branch, tag or commit on the hub; None: main.
        allow_missing: weights that are not there are random, with a warning, and no error.

    Raises:
        ValueError: if there is none, its files are not whole, not all weights are there and of the
            model, or the engine does not know the architecture.
    """
    found = find_model(name, revision)

    def load(base: FoundModel) -> nn.Module:
        return _load_base(base, DTYPES[dtype], allow_missing)

    tokenizer_of, adapters = found, (found.folder / ADAPTER_CONFIG_FILE).is_file()
    expected = f"{'adapters' if adapters else 'a model'} to load in {found.folder}"
    with one_line_errors(expected), the_same_at_random():
        if adapters:
            model, base = load_adapters(found.folder, load, allow_missing)
            tokenizer_of = found if has_tokenizer(found.folder) else base
        else:
            model = load(found)
        check_model(model.eval())
        model = model.to(device)
    tokenizer = _tokenizer_of(tokenizer_of)
    check_tokenizer(tokenizer, model, tokenizer_of.folder)
    return model, tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder.

    Raises:
        ValueError: if there is none that can be read.
    """
    return _tokenizer_of(FoundModel(folder, str(folder)))


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration in a config.json, in a model folder, or of a model on the Hugging Face hub.

    Raises:
        ValueError: if there is none, or the hub cannot be reached.
    """
    path = find_config(name, revision)
    file = path / CONFIG_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"model: expected a {CONFIG_FILE} in {path}, got none")
    read_settings(file)
    with one_line_errors(f"a configuration at {path}"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _load_base(found: FoundModel, dtype: torch.dtype, allow_missing: bool) -> Any:
    """A model without adapters, refused before its weights are read if that can be."""
    gguf = gguf_file(found)
    if gguf is None:
        weights, file = weight_files(found.folder), {}
        check_files(found.folder, weights)
        check_not_quantised(found.folder)
    else:
        weights, file = [gguf], {"gguf_file": gguf.name}
        check_files(found.folder, weights)
    with one_line_errors(f"a configuration to load in {found.folder}"):
        config = AutoConfig.from_pretrained(found.folder, trust_remote_code=False, **file)
        _check_config(config, found.folder, sum(path.stat().st_size for path in weights))
    model = load_base(found.folder, config, dtype, allow_missing, gguf)
    # What adapters on it will call their base.
    model.name_or_path = found.name
    model.config._commit_hash = found.revision
    return model


def _check_config(config: PreTrainedConfig, folder: Path, size: int) -> None:
    """That a config is one of a model that the engine knows and that so many bytes may hold."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    causal_lm(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > PER_BYTE * size:
        raise UserError(
            f"model: expected weights of the {count:,} parameters that {folder / CONFIG_FILE} "
            f"asks for, got files of {size:,} bytes"
        )


def _tokenizer_of(found: FoundModel) -> PreTrainedTokenizerBase:
    gguf = None if has_tokenizer(found.folder) else gguf_file(found)
    if gguf is None and not has_tokenizer(found.folder):
        raise UserError(f"model: expected a tokenizer in {found.folder}, got none of its files")
    file = {} if gguf is None else {"gguf_file": gguf.name}
    with one_line_errors(f"a tokenizer to load in {found.folder}"):
        return AutoTokenizer.from_pretrained(found.folder, trust_remote_code=False, **file)
