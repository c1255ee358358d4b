"""Weights, and that they are all the model's and no others."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..errors import UserError

SAVED_FROM = {
    "_orig_mod.": "a model of torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "a model with activation checkpointing",
    "module.": "DDP or DataParallel",
}
PEFT = "base_model.model."
NESTED = ("state_dict", "model", "model_state_dict", "module")  # of the files of trainers
NAMED = 3  # as many weights are named in an error

Shape = Sequence[int]


@dataclass(frozen=True)
class LoadedWeights:
    """What of a model and of its file did not meet.

    Attributes:
        count: the number of weights that the model has.
        missing: weights of the model that the file does not have.
        unexpected: weights in the file that the model does not have.
        mismatched: weights of both, with the shape in the file and in the model.
    """

    count: int
    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, Shape, Shape]]

    def check(self, folder: Path, whose: str, allow_missing: bool) -> None:
        """That the model has the weights of the file, or, if it need not, a warning.

        Raises:
            ValueError: naming a few weights, their number and the likely cause.
        """
        if not (self.missing or self.unexpected or self.mismatched):
            return
        text = f"model: expected the {self.count} weights of {whose} in {folder}, got {self}"
        if not allow_missing:
            raise UserError(
                f"{text}: {self._cause()}; --allow-missing goes on, with random weights where the "
                "model's are not there"
            )
        print(
            f"warning: {text}: going on, with random weights where the model's are not there",
            file=sys.stderr,
        )

    def _prefix(self) -> str:
        """What all unexpected names begin with, and without it are missing; "" if nothing is."""
        first = self.unexpected[0] if self.unexpected else ""
        prefix = next((first[: -len(n)] for n in self.missing if first.endswith(f".{n}")), "")
        missing = {f"{prefix}{name}" for name in self.missing}
        return prefix if missing.issuperset(self.unexpected) else ""

    def __str__(self) -> str:
        shapes = [f"{name} {[*file]} for {[*model]}" for name, file, model in self.mismatched]
        parts = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": shapes,
        }
        return ", ".join(f"{len(n)} {what} ({_few(n)})" for what, n in parts.items() if n)

    def _cause(self) -> str:
        for wrapper, saved_from in SAVED_FROM.items():
            if any(f".{wrapper}" in f".{name}" for name in self.unexpected):
                return f"saved from {saved_from}, whose {wrapper} is in the names: remove it there"
        of_peft = [name.startswith(PEFT) for name in self.unexpected]
        if any(of_peft) and self.missing and not any(n.startswith(PEFT) for n in self.missing):
            return "saved from a PEFT model: save what its merge_and_unload() returns"
        if self.missing and (prefix := self._prefix()):
            return f"{prefix} is before all the names: remove it there"
        if any(".default." in name for name in self.unexpected):
            return (
                "saved by the state_dict() of a PEFT model, with the adapter's name, default., in "
                "the names: save_pretrained() leaves it out"
            )
        if any(name in NESTED for name in self.unexpected):
            return "a whole state of training: save what it has under that name alone"
        if self.mismatched and not (self.missing or self.unexpected):
            return "a model of another size than its config says"
        if not self.missing and not self.mismatched:
            return "more weights than its config says, or of another architecture"
        if not self.unexpected and not self.mismatched:
            return "an incomplete checkpoint, or fewer weights than its config says"
        return "weights of another architecture or size than its config says"


def load_base(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    allow_missing: bool = False,
    gguf: Path | None = None,
) -> Any:
    """The causal LM in a folder, with all its weights.

    Raises:
        ValueError: if its weights are not those of the config.
    """
    config.return_dict = True  # the engine reads outputs by name
    file = {} if gguf is None else {"gguf_file": gguf.name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **file,
    )
    model, info = loaded
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    made_anew = {name for name, _ in model.named_buffers()}  # older versions saved them too
    names = (sorted(set(info[kind]) - made_anew) for kind in kinds)
    weights = LoadedWeights(len([*model.parameters()]), *names)
    weights.check(folder, type(model).__name__, allow_missing)
    if gguf is not None:
        _forget_quantisation(model)
    return model


@contextmanager
def the_same_at_random() -> Iterator[None]:
    """Weights that are not in a file are random, but the same for a model and its teacher."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _forget_quantisation(model: Any) -> None:
    """transformers would refuse to save, as quantised, what it has dequantised."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + ", …" * (len(names) > NAMED)
