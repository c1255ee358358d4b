"""The meta step in transformers' Trainer: data sets, callbacks, checkpoints and reports as ever."""

from importlib.util import find_spec

if find_spec("accelerate") is None:
    raise ImportError(
        "gdprompt_fast.trainer: expected accelerate, which transformers' Trainer needs, to be "
        'installed (pip install "gdprompt_fast[trainer]")'
    )

from .arguments import MetaTrainingArguments
from .collate import MetaCollator
from .trainer import MetaTrainer

__all__ = ["MetaCollator", "MetaTrainer", "MetaTrainingArguments"]
