"""Small files in the layouts of the classification tasks, a model that reads them, a preset."""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gdprompt_fast.data.words import word_tokenizer
from gdprompt_fast.icl.context import IclContext, icl_contexts
from gdprompt_fast.icl.preset import Preset
from gdprompt_fast.icl.tasks import TASKS
from helpers.models import small_llama

CPU = torch.device("cpu")
WORDS = ["red", "blue", "green", "dull", "bright", "long", "film", "scene", "plot", "river"]
SIZES = """
[model]
name = "MODEL"
seeds = [0, 1]
[prompt]
demonstrations = 3
window = 120
[evaluate]
batch_size = 4
examples = 6
control_examples = 3
[tasks.cb]
seed = 1
lr = 0.5
[tasks.mr]
seed = 2
lr = 0.5
[table1]
tasks = ["cb", "mr"]
[table2]
tasks = ["cb", "mr"]
[table3]
tasks = ["mr"]
clip = 0.1
[table4]
tasks = ["mr"]
[attention]
tasks = ["mr"]
examples = 3
tokens = 4
demonstrations = 1
[meta-trained.pairs.bundled]
base = "bundled"
meta_trained = { kl = "bundled-meta-trained" }
inner_lr = 0.5
base_inner_lrs = [0.05]
examples = 3
control_examples = 2
"""


def sentence(generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(3, 6)))


def write_lines(path: Path, rows: int, labels: int = 2, seed: int = 0) -> Path:
    """Lines "LABEL TEXT"."""
    generator = random.Random(seed)
    lines = [f"{index % labels} {sentence(generator)} \n" for index in range(rows)]
    path.write_text("".join(lines), encoding="latin-1")
    return path


def write_cb(path: Path, rows: int, seed: int = 0) -> Path:
    generator, labels = random.Random(seed), ("entailment", "contradiction", "neutral")
    texts = [
        {"premise": sentence(generator), "hypothesis": sentence(generator), "label": labels[i % 3]}
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in texts))
    return path


def vocabulary() -> list[str]:
    """The words and marks of all tasks' questions and answers, and of the sentences."""
    asked = "Sentence: Label: Review: Sentiment: Input: Type: Question: Answer: . True, False, or ?"
    answers = [option for task in TASKS.values() for option in task.options]
    return sorted({*WORDS, *re.findall(r"\w+|[^\w\s]+", asked), *answers, *".:,?"})


def write_model(folder: Path, layers: int = 2) -> Path:
    """A random Llama over these words."""
    tokenizer = word_tokenizer(vocabulary())
    small_llama(
        len(tokenizer),
        num_hidden_layers=layers,
        max_position_embeddings=128,
        initializer_range=0.3,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_sizes(folder: Path) -> dict[str, Any]:
    """A preset of every experiment at the smallest size, with its files in the folder."""
    sections = tomllib.loads(SIZES.replace("MODEL", write_model(folder / "model").as_posix()))
    files: dict[str, Callable[..., Path]] = {"cb": write_cb, "mr": write_lines}
    for name, write in files.items():
        for key, seed in (("file", 0), ("test_file", 1)):
            path = write(folder / f"{name}-{key}", 12, seed=seed)
            sections["tasks"][name][key] = path.as_posix()
    return sections


def contexts_of(sections: dict[str, Any], output: Path) -> list[IclContext]:
    return icl_contexts(Preset.read(sections), output, CPU)
