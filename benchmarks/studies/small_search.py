"""Rates and lengths for LoRA and for several contexts a θ', on the bundled model: a search.

    python -m benchmarks.studies.small_search --work runs/search

It goes on with results/small_search.jsonl. Every candidate is trained as an arm of the experiments
of `--preset small`, on character-description, which is learnt in the fewest steps, on a seed that
the experiments do not have, and evaluated on its test examples: the share of right answers after
Fine-Tuning.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gdprompt_fast.evaluation import evaluate
from gdprompt_fast.experiments import ExperimentContext, Preset, experiment_contexts
from gdprompt_fast.experiments.tasks import examples, prepare_stage, teacher_stage
from gdprompt_fast.experiments.variants import Variant, load, train_stage
from gdprompt_fast.runs.experiment_run import preset_sizes

from ..harness.rows import RESULTS

SEED, TESTED = 9, 200
TASK = "character-description"
FULL = Variant(TASK, "gold")
FAMILIES = {
    "full": FULL,
    "contexts-1": Variant(TASK, "kl"),
    "lora": replace(FULL, lora_rank=1),
    "lora-inner": replace(FULL, lora_rank=1, inner_params="lora"),
    "contexts-4": Variant(TASK, "kl", contexts=4),
    "contexts-16": Variant(TASK, "kl", contexts=16),
}
SHARED = ("data", "base", "teacher")  # stages that no candidate changes


@dataclass(frozen=True)
class Candidate:
    """Training options of a family of arms, over the preset's."""

    family: str
    options: Mapping[str, float]

    @property
    def key(self) -> str:
        """A name that no other candidate has."""
        parts = (f"{name}={value:g}" for name, value in self.options.items())
        return "_".join([self.family, *parts])


GRIDS = {  # outer and inner rates
    "contexts-1": [(1e-3, 0.5)],
    "contexts-4": [(1e-3, 2.0), (1e-3, 0.5)],
    "contexts-16": [(1e-3, 4.0), (1e-3, 0.5)],
    "full": [(1e-3, 0.5)],
    "lora": [(5e-3, 0.5), (1e-2, 0.5), (5e-3, 2.0)],
    "lora-inner": [(5e-3, 4.0), (1e-2, 4.0), (5e-3, 0.5)],
}
STEPS = 200
CANDIDATES = [  # families in turns
    Candidate(family, {"outer_lr": outer, "inner_lr": inner, "steps": STEPS})
    for number in range(max(map(len, GRIDS.values())))
    for family, grid in GRIDS.items()
    for outer, inner in grid[number : number + 1]
]


def preset_with(sections: dict[str, Any], candidate: Candidate, seeds: Sequence[int]) -> Preset:
    """The preset with a candidate's options in ``[train.FAMILY]``."""
    changed = copy.deepcopy(sections)
    changed["train"].setdefault(candidate.family, {}).update(candidate.options)
    changed["tasks"][TASK]["test"] = TESTED
    for name in changed["tasks"].keys() - {TASK}:
        changed["tasks"][name].pop("options", None)  # of trainings of other lengths
    changed["model"]["seeds"] = list(seeds)
    return Preset.read(changed)


def prepare(sections: dict[str, Any], work: Path, device: torch.device) -> None:
    """The stages that all candidates share."""
    preset = preset_with(sections, CANDIDATES[0], [SEED])
    (ctx,) = experiment_contexts(preset, work / "shared", device)
    prepare_stage(ctx, TASK)
    teacher_stage(ctx, TASK, ctx.preset.train_options(TASK))


def measure(
    sections: dict[str, Any], candidate: Candidate, work: Path, device: torch.device
) -> dict[str, Any]:
    """The row of a candidate."""
    folder = work / candidate.key
    shared = work / "shared" / "stages" / f"seed-{SEED}"
    for name in SHARED:
        link = folder / "stages" / f"seed-{SEED}" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(shared / name, target_is_directory=True)
    (ctx,) = experiment_contexts(preset_with(sections, candidate, [SEED]), folder, device)
    variant = FAMILIES[candidate.family]
    train_stage(ctx, variant)
    return {
        "key": candidate.key,
        "family": candidate.family,
        **candidate.options,
        "accuracy": {name: _accuracy(ctx, variant, *how) for name, how in _ways(variant).items()},
    }


def _ways(variant: Variant) -> dict[str, tuple[int, bool]]:
    """How many contexts share a θ' in an evaluation, and whether one after another."""
    counts = {"gold": (), "kl": (4, 16) if variant.contexts == 1 else (variant.contexts,)}
    ways = {"1 context": (1, False)}
    for count in counts[variant.objective]:
        ways[f"{count} contexts, batched"] = (count, False)
        ways[f"{count} contexts, one after another"] = (count, True)
    return ways


def _accuracy(
    ctx: ExperimentContext, variant: Variant, contexts: int, one_after_another: bool
) -> float:
    model, tokenizer = load(ctx, variant)
    chosen = examples(ctx, variant.task, "test", model, tokenizer)
    scores = evaluate(
        model,
        tokenizer,
        chosen,
        variant.inner(ctx),
        ctx.preset.evaluate.batch_size,
        settings=("fine_tuning",),
        answer_tokens=0,
        contexts_per_group=contexts,
        one_after_another=one_after_another,
    )
    return scores["fine_tuning"].summary().accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of stages")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    path, device = RESULTS / "small_search.jsonl", torch.device(arguments.device)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    sections = preset_sizes("small")
    prepare(sections, arguments.work, device)
    for candidate in CANDIDATES:
        if candidate.key not in {row["key"] for row in rows}:
            rows.append(measure(sections, candidate, arguments.work, device))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
