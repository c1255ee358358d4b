"""The bundled models: a small Llama that answers from a passage, in its prompt or learnt from it.

``pretrain.py`` made the first, the base; its words are those of the generators in
``gdprompt_fast.data``. ``gdprompt demo`` meta-trains it, and ``meta_trained.py`` made the second of
what that leaves.
"""

from __future__ import annotations

from pathlib import Path

META_TRAINED_INNER_LR = 0.5  # that the demo trains at


def bundled_folder() -> Path:
    """The transformers model folder of the base: configuration, safetensors and tokenizer."""
    return Path(__file__).parent / "model"


def meta_trained_folder() -> Path:
    """The same of the meta-trained model, in float16: one step on a passage at
    ``META_TRAINED_INNER_LR`` does what the passage in the prompt does.
    """
    return Path(__file__).parent / "meta_trained_model"
