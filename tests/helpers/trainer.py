"""Short runs of a MetaTrainer on people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from gdprompt_fast.data.people import make_people_data
from gdprompt_fast.trainer import MetaTrainer, MetaTrainingArguments
from helpers.training import TOKENIZER, tiny_llama

ROWS: Dataset = make_people_data(1, 7, seed=0).test


def arguments(output: Path, **changes: Any) -> MetaTrainingArguments:
    """Of a run on the CPU that writes nothing by itself."""
    options: dict[str, Any] = dict(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        inner_lr=0.3,
        lm_weight=0.1,
        objective="gold",
    )
    return MetaTrainingArguments(**{**options, **changes})


def trainer_on(
    output: Path, model: nn.Module | None = None, rows: Any = ROWS, **changes: Any
) -> MetaTrainer:
    """On the rows as training and test set; ``changes`` are arguments of either."""
    of_trainer = ("teacher", "peft_config", "callbacks", "compute_metrics", "data_collator")
    others = {name: changes.pop(name) for name in of_trainer if name in changes}
    return MetaTrainer(
        tiny_llama() if model is None else model,
        arguments(output, **changes),
        rows,
        rows,
        processing_class=TOKENIZER,
        **others,
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
