"""Fixtures of the experiments' tests."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from gdprompt_fast.data.characters import characters_vocabulary
from gdprompt_fast.data.people import people_vocabulary
from gdprompt_fast.data.words import word_tokenizer
from gdprompt_fast.experiments import (
    EXPERIMENTS,
)
from gdprompt_fast.experiments.run import run_experiment
from gdprompt_fast.ops import backend
from helpers.experiments import TINY, contexts_of
from helpers.models import small_llama
from helpers.once import made_once


@pytest.fixture(scope="session")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny preset, on a random Llama over the generators' words."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = word_tokenizer(sorted({*people_vocabulary(), *characters_vocabulary()}))
    model = small_llama(
        len(tokenizer), num_hidden_layers=1, max_position_embeddings=128, tie_word_embeddings=True
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tomllib.loads(TINY.replace("MODEL", folder.as_posix()))


@pytest.fixture(scope="session")
def done(sections: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all experiments, made once for all of pytest's processes."""
    pytest.importorskip("peft", reason="PEFT is an optional dependency, of Table 1's LoRA variants")
    with made_once("experiments", tmp_path_factory) as (output, is_there):
        if not is_there:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(backend, "load_cpp", lambda: False)  # as every test has it
                for name in EXPERIMENTS:
                    run_experiment(name, contexts_of(sections, output))
    return output
