"""The plan of a step in parts, and the largest part that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from gdprompt_fast.data import Limits, tokenise_triples
from gdprompt_fast.data.people import make_people_data
from gdprompt_fast.plan import PlannedStep, largest_micro_batch, predict
from gdprompt_fast.plan.prediction import run_step
from gdprompt_fast.runs.fitting import fitting
from helpers.training import GOLD, TOKENIZER, tiny_llama

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=1,
    num_attention_heads=4,
    vocab_size=256,
)
STEP = PlannedStep(batch=6, context=48, query=12, response=4, dtype="fp32")


def peak(batch: int, micro_batch: int) -> int:
    return predict(CONFIG, replace(STEP, batch=batch, micro_batch=micro_batch)).peak_bytes


def test_parts_are_planned_as_the_whole_run_takes_them() -> None:
    planned = replace(STEP, micro_batch=2)
    whole = run_step(CONFIG, planned)
    peaks = [sum(t.at_peak().values()) for t in (whole.meta_step, whole.optimizer_step)]
    assert predict(CONFIG, planned).peak_bytes == pytest.approx(max(peaks), rel=0.01)


def test_the_peak_goes_by_the_parts_and_hardly_by_the_batch() -> None:
    assert peak(60, 2) < 1.1 * peak(6, 2)
    assert peak(6, 2) < 0.7 * peak(6, 0)


def test_the_largest_part_that_fits_is_found() -> None:
    for fits in (1, 2):
        assert largest_micro_batch(CONFIG, STEP, peak(6, fits)) == fits
    assert largest_micro_batch(CONFIG, STEP, peak(6, 0)) == 6
    assert largest_micro_batch(CONFIG, STEP, peak(6, 1) - 1) == 0


def test_a_training_takes_the_largest_part_that_fits() -> None:
    data = make_people_data(1, 5, seed=0).test
    examples = tokenise_triples(data, TOKENIZER, Limits(64, 64, 64)).examples
    options, model = replace(GOLD, batch_size=8), tiny_llama()
    assert fitting(options, model, examples, 10**10) == options
    with pytest.raises(ValueError, match=r"memory: expected at least .*GB .*, got 0.00GB"):
        fitting(options, model, examples, 1000)
