"""θ' that was kept, as plain PEFT and plain transformers have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gdprompt_fast import InnerUpdate, inner_step
from helpers.models import ragged

INNER_LR = 0.1
OF_THE_CHANGE = 1e-5


def contexts() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and groups of four contexts; the second group has two of them."""
    return *ragged([7, 5, 9, 9], 9, 1), torch.tensor([0, 1, 1, 2])


def queries(rows: int = 2) -> Tensor:
    return ragged([8] * rows, 8, 3)[0]


def learnt(model: nn.Module, steps: int = 1, inner_params: Any = "full") -> InnerUpdate:
    """θ' of three groups."""
    options: dict[str, Any] = dict(inner_lr=INNER_LR, inner_steps=steps, inner_params=inner_params)
    return inner_step(model, *contexts(), **options)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=queries()).logits


def logits_at(update: InnerUpdate, model: nn.Module, group: int) -> Tensor:
    with update.applied_to(model, torch.full((2,), group)):
        return logits(model)


def distance(given: Tensor, expected: Tensor, before: Tensor) -> float:
    """‖given − expected‖ of the change ‖expected − before‖."""
    return float((given - expected).norm() / (expected - before).norm())


def with_peft(base: nn.Module, *folders: Path) -> Any:
    """A base with the adapters of some folders, named 0, 1, …, by PEFT alone."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=str(number))
    return model.eval()


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return content
