"""The bundled model: a small Llama that answers from a passage in its prompt.

``pretrain.py`` made it; its words are those of the generators in ``gdprompt_fast.data``.
"""

from __future__ import annotations

from pathlib import Path


def bundled_folder() -> Path:
    """The transformers model folder: configuration, safetensors and tokenizer."""
    return Path(__file__).parent / "model"
