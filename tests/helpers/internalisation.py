"""A preset of every experiment on internalisation at the smallest size, and its data."""

from __future__ import annotations

import gzip
import struct
import tomllib
from pathlib import Path
from typing import Any

import torch

from gdprompt_fast.data.words import word_tokenizer
from helpers.models import small_llama

TINY = """
[model]
name = "MODEL"
seeds = [0, 1]
[people]
entities = 32
file = "PEOPLE"
[triples]
entities = 32
file = "TRIPLES"
[ask]
new_tokens = 2
batch_size = 64
questions = 3
attribution = ["who"]
[stages.first]
epochs = 1
batch_size = 128
block = 36
[stages.second]
epochs = 1
batch_size = 64
block = 36
[stages.joint]
epochs = 1
batch_size = 128
block = 36
[main]
stage2_seeds = 2
third_tag = false
[trex]
[joint]
third_tag = false
stage2_seeds = 2
[attribution]
stage2_seeds = 2
third_tag = false
[alpha]
alphas = [0.5, 0.75]
[word-order]
orders = ["tve", "etv"]
fewer = {etv = [1, 1]}
[batch-size]
source = "numbers"
batches = [64, 1000]
epochs = [1, 1]
[data-amount]
source = "numbers"
amounts = [20, 30]
[number-lists]
[number-lists.lists]
variables = 20
numbers = 6
length = 2
trained = 2
tested = 1
[number-lists.model]
width = 16
layers = 1
heads = 2
[number-lists.first]
epochs = 2
batch_size = 64
lr = 1e-2
block = 8
[number-lists.second]
epochs = 1
batch_size = 8
block = 8
[mnist]
folder = "DIGITS"
pairs = [10]
examples = 32
batch_size = 16
side = 7
channels = [4]
strides = [2]
tested = 1
[alignment]
batches = [16, 64]
epochs = [1, 1]
every = [1, 1]
definitions = 2
questions = 2
costs = 1
[meta]
contexts = 4
queries = 1
second_tag = true
arms = {epochs = 1}
"""
HEAD = "name,birth,death,gender,level3_main_occ,string_citizenship_raw_d,un_region"
WORKS = ("P123", "P577", "P136", "P50", "P840")


def write_people(path: Path, count: int) -> Path:
    """A table with the columns of the Cross-Verified Database."""
    rows = [f"{HEAD},wiki_readers_2015_2018"]
    for i in range(count):
        occupation, country = ("writer", "actor")[i % 2], ("Peru", "Chile", "Cuba")[i % 3]
        region = ("America", "Asia")[i % 2]
        fields = (f"Given{i} Family{i}", 1700 + i, 1790 + i, ("Male", "Female")[i % 2])
        rows.append(",".join(map(str, (*fields, occupation, country, region, 10 + i))))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def write_triples(path: Path, count: int) -> Path:
    """A table of works with five questions each."""
    rows = ["subject\tpredicate\tobject"]
    for i in range(count):
        objects = (f"House{i % 3}", str(1900 + i), f"genre{i % 4}", f"Ann Lee{i}", f"Town{i % 5}")
        rows += [f"Work{i} (book)\t{p}\t{o}" for p, o in zip(WORKS, objects, strict=True)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def write_digits(folder: Path) -> Path:
    """MNIST's four files with a few random images, two of them gzipped."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for split, packed in (("train", True), ("t10k", False)):
        labels = torch.arange(20) % 10
        images = torch.randint(256, (20, 28, 28), generator=generator)
        for name, kind, values in (("images", 3, images), ("labels", 1, labels)):
            head = struct.pack(f">HBB{kind}I", 0, 8, kind, *values.shape)
            content = head + bytes(values.to(torch.uint8).flatten().tolist())
            file = folder / f"{split}-{name}-idx{kind}-ubyte"
            if packed:
                file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(content))
            else:
                file.write_bytes(content)
    return folder


def write_model(folder: Path) -> Path:
    """A random Llama over a few words."""
    words = ["Q", "A", ":", "What", "Who", "When", "was", "is", "the", "gender", "<", "|", ">", "?"]
    tokenizer = word_tokenizer(words)
    model = small_llama(len(tokenizer), num_hidden_layers=1, max_position_embeddings=64)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_sections(folder: Path, again: bool = False) -> dict[str, Any]:
    """The preset, with its data made in a folder, or there ``again``."""
    makers = {
        "MODEL": lambda: write_model(folder / "tiny"),
        "PEOPLE": lambda: write_people(folder / "people.csv", 40),
        "TRIPLES": lambda: write_triples(folder / "works.tsv", 32),
        "DIGITS": lambda: write_digits(folder / "digits"),
    }
    places = {"MODEL": "tiny", "PEOPLE": "people.csv", "TRIPLES": "works.tsv", "DIGITS": "digits"}
    text = TINY
    for name, make in makers.items():
        path = folder / places[name] if again else make()
        text = text.replace(f'"{name}"', f'"{path.as_posix()}"')
    return tomllib.loads(text)
