"""A model's files, before transformers reads them: what is not there, cut short or of no use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from .find import ADAPTER_CONFIG_FILE, CONFIG_FILE, FoundModel

POINTER = b"version https://git-lfs"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # transformers takes the first that is there
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
READ_FIRST = (
    *(CONFIG_FILE, ADAPTER_CONFIG_FILE, "tokenizer_config.json", "tokenizer.json"),
    *("generation_config.json", "special_tokens_map.json"),
)
NO_WEIGHTS = ("I", "U", "BOOL")  # how the types begin that only quantised weights have
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)


def check_files(folder: Path, weights: list[Path]) -> None:
    """That a folder's settings, tokenizer and these weights are the files themselves and whole.

    Raises:
        ValueError: naming the file.
    """
    small = [
        path for kind in ("json", "model", "txt", "jinja") for path in folder.glob(f"*.{kind}")
    ]
    for path in [*sorted(small), *weights]:
        _check_no_pointer(path)
    for name in READ_FIRST:
        if (folder / name).is_file():
            read_settings(folder / name)
    for path in weights:
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        elif path.suffix == ".bin" and is_zipfile(path):
            _check_pickle(path)


def weight_files(folder: Path, names: tuple[str, ...] = WEIGHTS) -> list[Path]:
    """The files of a folder's weights: whole, or the shards that an index lists.

    Raises:
        ValueError: if some are not there.
    """
    for name in names:
        path, index = folder / name, folder / f"{name}.index.json"
        if path.is_file():
            return [path]
        if index.is_file():
            return _shards(index)
    raise UserError(
        f"model: expected weights in {folder} ({' or '.join(names)}, whole or with an index of its "
        "shards), got none"
    )


def gguf_file(found: FoundModel) -> Path | None:
    """The GGUF file to load, None where the folder has weights of another kind.

    Raises:
        ValueError: naming the files, if there are several.
    """
    if found.gguf is not None:
        return found.gguf
    files = sorted(found.folder.glob("*.gguf"))
    index = [found.folder / f"{name}{end}" for name in WEIGHTS for end in ("", ".index.json")]
    if not files or any(path.is_file() for path in index):
        return None
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise UserError(
            f"model: expected one GGUF file in {found.folder}, got {names}: give the path of one"
        )
    return files[0]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of its own."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: naming the file.
    """
    _check_no_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"model: expected JSON in {path}, got {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"model: expected a JSON object in {path}, got {type(content).__name__}")
    return content


def check_not_quantised(folder: Path) -> None:
    """The engine needs plain weights, inside and outside.

    Raises:
        ValueError: naming the kind of quantisation.
    """
    quantised = read_settings(folder / CONFIG_FILE).get("quantization_config")
    if quantised:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"model: expected weights that are not quantised, got {kind} in {folder}: take the "
            "checkpoint it was made of, or dequantise it"
        )


def _shards(index: Path) -> list[Path]:
    names = read_settings(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"model: expected a weight_map of names to files in {index}, got {names!r}")
    shards = [index.parent / name for name in sorted(set(names.values()))]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise UserError(
            f"model: expected {len(shards)} shards beside {index}, got none of "
            f"{', '.join(missing[:3])}{' …' * (len(missing) > 3)} ({len(missing)} are not there)"
        )
    return shards


def _check_no_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(
                f"model: expected the file itself, got a Git-LFS pointer in {path}: "
                "git lfs pull fetches the file"
            )


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            types = {name: str(file.get_slice(name).get_dtype()) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"model: expected a whole safetensors file, got {path}, cut short or damaged ({error})"
        ) from error
    whole = {name: type_ for name, type_ in types.items() if type_.startswith(NO_WEIGHTS)}
    _check_types(whole, path)


def _check_pickle(path: Path) -> None:
    """Of a .bin file only the names and types are read here."""
    content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    if not isinstance(content, dict):
        raise UserError(
            f"model: expected weights by name in {path}, got a {type(content).__name__}"
        )
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    whole = {n: t for n, t in tensors.items() if not (t.is_floating_point() or t.is_complex())}
    _check_types({name: str(tensor.dtype) for name, tensor in whole.items()}, path)


def _check_types(whole: dict[str, str], path: Path) -> None:
    """That no weight is among these, of whole numbers, as masks that old models saved may be: read
    as numbers without the scales of their quantisation, they would be other weights.
    """
    for name, type_ in whole.items():
        if name.endswith(".weight"):
            raise UserError(
                f"model: expected weights that are not quantised, got {type_} for {name} in {path}"
            )
