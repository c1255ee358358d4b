"""The search of rates for LoRA and for several contexts."""

from __future__ import annotations

from benchmarks.studies.small_search import CANDIDATES, FAMILIES, SEED, STEPS, TASK, preset_with
from gdprompt_fast.runs.experiment_run import preset_sizes


def test_every_candidate_trains_as_it_says() -> None:
    sections = preset_sizes("small")
    assert {candidate.family for candidate in CANDIDATES} == FAMILIES.keys()
    for candidate in CANDIDATES:
        preset, variant = preset_with(sections, candidate, [SEED]), FAMILIES[candidate.family]
        kind = candidate.family if variant.lora_rank else "full"
        options = preset.train_options(TASK, kind, variant.contexts)
        given = candidate.options
        assert options.steps == STEPS
        assert (options.outer_lr, options.inner_lr) == (given["outer_lr"], given["inner_lr"])
