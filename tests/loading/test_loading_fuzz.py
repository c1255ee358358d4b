"""Model folders mangled at random: a UserError of one line, or all weights of the file.

``GDPROMPT_FUZZ=5000 pytest tests/loading/test_loading_fuzz.py`` draws more; a failure names its
seed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from gdprompt_fast.errors import UserError
from gdprompt_fast.loading import add_lora, load_model, print_notes
from gdprompt_fast.training.checkpoint import save_model
from helpers.model_folders import POINTER

CPU = torch.device("cpu")
DRAWS = int(os.environ.get("GDPROMPT_FUZZ", "150"))
BATCHES = 10  # of seeds, a test each
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 40, 4096, 3.5, -0.5, 1e30),
    *("", "x", "silu", "bfloat16", "llama", "gpt2", "main", "../x"),
    *([], [1], ["x", None], {}, {"x": 1}),
]
HEADER = 8  # bytes of a safetensors file that say how long its header is


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Whole, in shards, and adapters of it."""
    home = tmp_path_factory.mktemp("fuzz")
    model, tokenizer = load_model(model_folder, "float32", CPU)
    save_model(model, tokenizer, home / "whole")
    model.save_pretrained(home / "shards", max_shard_size="8KB")
    tokenizer.save_pretrained(home / "shards")
    pytest.importorskip("peft", reason="PEFT is an optional dependency")
    model.name_or_path = str(home / "whole")
    save_model(add_lora(model, 2, 0), tokenizer, home / "adapters")
    return [home / "whole", home / "shards", home / "adapters"]


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_mangled_folder_is_one_line_or_loads_whole(
    batch: int, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for seed in range(batch, DRAWS, BATCHES):
        rng = random.Random(seed)
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(rng.choice(folders), folder)
        done = mangle(folder, rng)
        try:
            model, tokenizer = load_model(folder, "float32", CPU)
            print_notes(model, tokenizer)
        except UserError as error:
            assert "\n" not in str(error), (seed, done, str(error))
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {done}: {type(error)}") from error
        assert not unaccounted(model, folder), (seed, done)


def mangle(folder: Path, rng: random.Random) -> str:
    """Damages a file of a folder; returns what was done to it."""
    path = rng.choice([*sorted(folder.glob("*.json")), *sorted(folder.glob("*.safetensors"))])
    ways = [cut, flip, pointer, remove, *[change_json] * 6]
    way = rng.choice(ways)
    return f"{path.name}: {way.__name__} {way(path, rng)}"


def cut(path: Path, rng: random.Random) -> int:
    content = path.read_bytes()
    size = rng.randrange(len(content))
    path.write_bytes(content[:size])
    return size


def flip(path: Path, rng: random.Random) -> list[int]:
    content = bytearray(path.read_bytes())
    places = [rng.randrange(min(len(content), 3000)) for _ in range(rng.choice([1, 2, 8]))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return places


def pointer(path: Path, _: random.Random) -> None:
    path.write_text(POINTER)


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


def change_json(path: Path, rng: random.Random) -> str:
    """Deletes, renames or replaces something in a JSON file or in the header of safetensors."""
    content, rest = path.read_bytes(), b""
    weights = path.suffix == ".safetensors"
    if weights:
        end = HEADER + int.from_bytes(content[:HEADER], "little")
        content, rest = content[HEADER:end], content[end:]
    settings = json.loads(content)
    done = "; ".join(change(settings, rng) for _ in range(rng.choice([1, 1, 2])))
    content = json.dumps(settings).encode()
    path.write_bytes((len(content).to_bytes(HEADER, "little") if weights else b"") + content + rest)
    return done


def change(settings: Any, rng: random.Random) -> str:
    at: list[Any] = []
    while True:
        keys = list(settings) if isinstance(settings, dict) else range(len(settings))
        if not keys:
            return f"nothing at {at}"
        key = rng.choice(keys)
        at.append(key)
        if not isinstance(settings[key], dict | list) or rng.random() < 0.3:
            break
        settings = settings[key]
    way = rng.choice(["delete", "rename", "replace", "replace"])
    if way == "replace" or isinstance(settings, list):
        settings[key] = rng.choice(VALUES)
        return f"{at} = {settings[key]!r}"
    value = settings.pop(key)
    if way == "rename":
        settings[f"{key}x"] = value
    return f"{way} {at}"


def unaccounted(model: Any, folder: Path) -> list[str]:
    """Weights of the files that the model has not, or not so, and others that it has."""
    adapters = (folder / "adapter_config.json").is_file()
    file = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    own = {
        name.replace(".default.", "."): weight
        for name, weight in model.state_dict().items()
        if ".lora_" in name or not adapters
    }
    if not adapters and model.config.tie_word_embeddings:
        own.pop("lm_head.weight")
    wrong = own.keys() ^ file.keys()
    return sorted(wrong) + [
        name
        for name in own.keys() & file.keys()
        if own[name].shape != file[name].shape
        or not torch.equal(own[name].nan_to_num(), file[name].float().nan_to_num())
    ]
