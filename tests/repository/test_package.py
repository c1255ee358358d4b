"""What an installed package promises: its names, its kernels' place, and a README that runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import gdprompt_fast
from gdprompt_fast.bundled import bundled_folder
from gdprompt_fast.data import (
    Limits,
    characters_vocabulary,
    make_people_data,
    people_vocabulary,
    tokenise_triples,
)
from gdprompt_fast.evaluation import InnerStep, evaluate
from gdprompt_fast.loading import load_model
from helpers.paths import ROOT


def test_the_public_names_are_there() -> None:
    for name in gdprompt_fast.__all__:
        assert getattr(gdprompt_fast, name).__doc__


def test_an_installation_has_no_top_level_package_kernels(tmp_path: Path) -> None:
    """transformers would take it for Hugging Face's own. Here the root is on the path, folders and
    all; where the package is installed it is not.
    """
    code = "import sys, gdprompt_fast.cli.main as _; print(sys.modules.get('kernels'))"
    environment = {n: value for n, value in os.environ.items() if n != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    if "No module named 'gdprompt_fast'" in done.stderr:
        pytest.skip("the package is not installed")
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout


def test_the_example_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(code, {})
    assert float(capsys.readouterr().out) > 0


def test_the_bundled_model_is_small_and_answers_from_its_prompt_alone() -> None:
    folder = bundled_folder()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6
    model, tokenizer = load_model(folder, "float32", torch.device("cpu"))
    unseen = make_people_data(1, 200, seed=1).test
    examples = tokenise_triples(unseen, tokenizer, Limits(128, 128, 128)).examples
    settings = ("no_context", "prompt")
    scores = evaluate(
        model, tokenizer, examples, InnerStep(0.1), 100, settings=settings, answer_tokens=0
    )
    accuracy = {setting: of.summary().accuracy for setting, of in scores.items()}
    assert accuracy["prompt"] >= 0.95 and accuracy["no_context"] <= 0.05


def test_the_bundled_model_knows_every_word_of_the_generators() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder())
    words = {*people_vocabulary(), *characters_vocabulary()}
    assert words <= tokenizer.get_vocab().keys()
