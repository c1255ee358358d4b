"""Models, tokenizers and data as the command line names them, checked before any long work."""

from .adapters import add_lora, base_on_disk, load_adapter_weights
from .causes import one_line_errors
from .find import FoundModel, find_model, fingerprint_of
from .fit import (
    check_same_tokens,
    check_same_vocabulary,
    check_vocabulary,
    max_prompt_length,
    positions,
    print_notes,
    vocabulary_size,
)
from .model import DTYPES, choose_device, load_config, load_model, load_tokenizer
from .weights import load_base

__all__ = [
    "DTYPES",
    "FoundModel",
    "add_lora",
    "base_on_disk",
    "check_same_tokens",
    "check_same_vocabulary",
    "check_vocabulary",
    "choose_device",
    "find_model",
    "fingerprint_of",
    "load_adapter_weights",
    "load_base",
    "load_config",
    "load_model",
    "load_tokenizer",
    "max_prompt_length",
    "one_line_errors",
    "positions",
    "print_notes",
    "vocabulary_size",
]
