"""The best of the models that a training goes through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import write_json
from ..evaluation.held_out import MERIT
from .checkpoint import save_model, write_together

BEST_FOLDER, BEST_FILE = "best", "best.json"


class BestModel:
    """The model with the lowest held-out NLL of Fine-Tuning so far, in ``output/best``.

    Args:
        rows: of the metrics up to where the training begins.
    """

    def __init__(self, output: Path, rows: Iterable[Mapping[str, float]]) -> None:
        self._folder = output / BEST_FOLDER
        self._lowest = min((row[MERIT] for row in rows if MERIT in row), default=float("inf"))

    def keep(
        self,
        step: int,
        numbers: Mapping[str, float],
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Saves the model after ``step`` if these numbers are the best."""
        merit = numbers.get(MERIT)
        if merit is None or merit >= self._lowest:
            return
        self._lowest = merit

        def write(folder: Path | None) -> None:
            save_model(model, tokenizer, folder)
            if folder is not None:
                write_json(folder / BEST_FILE, {"step": step, **numbers})

        write_together(self._folder, model, write)
