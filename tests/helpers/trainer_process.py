"""A process of a run that accelerate starts; its arguments are those of ``run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from gdprompt_fast.data.people import make_people_data
from gdprompt_fast.trainer import MetaTrainer
from helpers.trainer import arguments, weights
from helpers.training import TOKENIZER, tiny_llama


class InOrder(MetaTrainer):
    """Takes the rows as they stand, which are then the same ones however many processes share."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        size, collate = self.args.per_device_train_batch_size, self.data_collator
        rows: Any = self.train_dataset
        loader = DataLoader(rows, batch_size=size, collate_fn=collate)
        return self.accelerator.prepare(loader)


def run(output: Path, size: int, accumulated: int) -> None:
    """Trains on 24 rows, evaluates on 12, and has every process write what came of it."""
    args = arguments(
        output,
        max_steps=3,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        per_device_eval_batch_size=2,
        objective="kl",
        answer_tokens=3,
        optim="sgd",
        save_strategy="steps",
        save_steps=3,
    )
    data = make_people_data(24, 12, seed=0)
    model = tiny_llama().double()
    trainer = InOrder(model, args, data.train, data.test, processing_class=TOKENIZER)
    trainer.train()
    result = {
        "weights": weights(model),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "processes": trainer.accelerator.num_processes,
    }
    torch.save(result, output / f"result-{args.process_index}.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
