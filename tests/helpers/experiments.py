"""A preset of every experiment at the smallest size."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from gdprompt_fast.experiments import (
    Preset,
    experiment_contexts,
)
from gdprompt_fast.experiments.context import ExperimentContext

CPU = torch.device("cpu")
TINY = """
[model]
name = "MODEL"
seeds = [0]
[limits]
context_tokens = 90
query_tokens = 48
prompt_tokens = 112
[prepare]
examples = 4
steps = 1
batch_size = 2
[train]
steps = 3
batch_size = 4
outer_lr = 1e-2
warmup_steps = 1
inner_lr = 0.5
answer_tokens = 3
teacher_batch_size = 8
checkpoint_every = 1
[train.lora-inner]
inner_lr = 0.25
[evaluate]
batch_size = 8
answer_tokens = 4
inner_lr_grid = [0.1]
tune_examples = 4
[tasks.character-description]
source = "character-description"
label = "character-description"
metrics = ["exact_match"]
train = 8
test = 8
[tasks.reversal-curse]
source = "reversal-curse"
label = "reversal-curse"
metrics = ["exact_match"]
train = 8
test = 8
[tasks.squad]
source = "people"
label = "people (in the place of SQuAD)"
metrics = ["exact_match", "f1"]
train = 8
test = 8
[tasks.wikitext]
source = "people-text"
label = "people-text (in the place of WikiText)"
metrics = ["token_accuracy"]
train = 8
test = 8
[figure2]
tasks = ["character-description", "reversal-curse", "squad", "wikitext"]
[table1]
tasks = ["squad", "wikitext"]
lora_rank = 1
[table2]
task = "squad"
objective = "kl"
contexts = [2, 4]
[table3]
source = "wikitext"
target = "squad"
examples = 4
[table4]
task = "squad"
objective = "kl"
train_examples = 4
samples = 2
[table5]
tasks = ["squad", "wikitext"]
irrelevant_seeds = [0]
[second-order]
task = "squad"
objective = "kl"
inner_lrs = [0.1, 0.5]
steps = 2
points = 1
probes = 1
[kept]
task = "squad"
objective = "kl"
prompt_weight = 0.3
text_weight = 0.1
[text]
task = "wikitext"
examples = 4
[findings]
margin = 0.1
"""


def contexts_of(sections: dict[str, Any], output: Path, **changes: Any) -> list[ExperimentContext]:
    """Contexts of a preset with changes, as ``train__outer_lr=1e-3``."""
    changed = copy.deepcopy(sections)
    for name, value in changes.items():
        section, key = name.split("__")
        changed[section][key] = value
    return experiment_contexts(Preset.read(changed), output, CPU)


def content(folder: Path, name: str) -> dict[str, Any]:
    """An experiment's JSON, which has no NaN."""

    def refuse_nan(constant: str) -> None:
        raise AssertionError(f"{constant} in {name}.json")

    text = (folder / f"{name}.json").read_text()
    loaded: dict[str, Any] = json.loads(text, parse_constant=refuse_nan)
    return loaded
