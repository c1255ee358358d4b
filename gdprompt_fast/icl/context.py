"""Where an experiment takes place: a preset and a model, and a seed at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..artifacts.files import hash_of_file
from ..experiments.context import base_model
from ..loading import DTYPES, fingerprint_of, load_config, load_model, load_tokenizer
from ..report.repetition import Repetition
from .blocks import check_plain
from .preset import Preset, PromptOptions, TaskOptions
from .prompts import PERMUTATIONS, Prompts, demonstrations, make_prompts
from .tasks import TASKS, items_of

BASE, UNTRAINED = "base", "untrained"


@dataclass(frozen=True, kw_only=True)
class IclContext(Repetition):
    """One repetition.

    Attributes:
        preset: the sizes and rates.
        model: the folder of the model.
        fingerprint: of that model's files.
    """

    preset: Preset
    model: Path
    fingerprint: str

    def load(self, which: str) -> nn.Module:
        """The model, or an untrained one of its configuration; whoever changes its weights puts
        them back.
        """
        seed = self.seed if which == UNTRAINED else None
        return load_once(self.model, self.preset.model.dtype, self.device, seed)

    def prompts(self, task: str) -> Prompts:
        """The task's rows, for this seed."""
        its, options = self.preset.tasks[task], self.preset.prompt
        examples = self.preset.evaluate.examples
        return _prompts(self.model, task, its, options, examples, self.seed)

    def count(self, task: str, control: bool = False) -> int:
        """How many queries of the task are evaluated."""
        options = self.preset.evaluate
        most = [options.examples, options.control_examples if control else None]
        return min([len(self.prompts(task).queries), *(each for each in most if each is not None)])

    def task_settings(self, task: str) -> dict[str, Any]:
        """What everything of a task follows from; how many demonstrations fit into the prompt, and
        so the prompt, follows from the longest query too.
        """
        its = self.preset.tasks[task]
        files = [hash_of_file(Path(file)) for file in (its.file, its.test_file) if file]
        general = asdict(self.preset.prompt) | {"dtype": self.preset.model.dtype}
        prompt = self.prompts(task).fingerprint
        of_task = {"draw": its.seed, "content": files, "rows": prompt}
        return {"model": self.fingerprint, **of_task, **general}


def icl_contexts(preset: Preset, output: Path, device: torch.device) -> list[IclContext]:
    """A repetition for every seed of the preset.

    Raises:
        UserError: if the model is not there, or a file.
    """
    model = base_model(preset.model.name, preset.model.revision)
    return IclContext.of_seeds(
        preset.model.seeds,
        output=output,
        device=device,
        preset=preset,
        model=model,
        fingerprint=fingerprint_of(model),
    )


@lru_cache(maxsize=2)
def load_once(folder: Path, dtype: str, device: torch.device, seed: int | None) -> nn.Module:
    """A model, or with a seed one of its configuration with fresh weights.

    Raises:
        UserError: if it is not one that can be recorded.
    """
    if seed is None:
        model, _ = load_model(folder, dtype, device)
    else:
        torch.manual_seed(seed)
        config = load_config(str(folder))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = model.to(device, DTYPES[dtype]).eval()
    check_plain(model)
    return model


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


@lru_cache(maxsize=32)
def _prompts(
    folder: Path,
    task: str,
    its: TaskOptions,
    options: PromptOptions,
    examples: int | None,
    seed: int,
) -> Prompts:
    file, test_file = (None if f is None else Path(f) for f in (its.file, its.test_file))
    to_draw, queries = _items(task, file, test_file)
    permutation = seed % (PERMUTATIONS + 1)
    demos = demonstrations(to_draw, options.demonstrations, its.seed + seed, permutation)
    room = getattr(load_config(str(folder)), "max_position_embeddings", options.window)
    return make_prompts(
        _tokenizer(folder),
        task,
        demos,
        queries[:examples],
        min(options.window, room),
        options.bos,
        options.eos,
    )


_items = lru_cache(maxsize=len(TASKS))(items_of)
