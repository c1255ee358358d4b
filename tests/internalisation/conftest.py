"""The experiments on internalisation at the smallest size, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gdprompt_fast.internalisation import EXPERIMENTS, Preset, contexts
from gdprompt_fast.internalisation.run import run_experiment
from gdprompt_fast.ops import backend
from helpers.internalisation import tiny_sections
from helpers.once import made_once


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, and in ``out`` all experiments."""
    with made_once("internalisation", tmp_path_factory) as (folder, is_there):
        if not is_there:
            folder.mkdir()
            preset = Preset.read(tiny_sections(folder))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(backend, "load_cpp", lambda: False)  # as every test has it
                repetitions = contexts(preset, folder / "out", torch.device("cpu"))
                for name in EXPERIMENTS:
                    run_experiment(name, repetitions)
    return folder


@pytest.fixture(scope="session")
def sections(made: Path) -> dict[str, Any]:
    """The preset that they were made with."""
    return tiny_sections(made, again=True)
