"""The rates that `experiments-small.toml` trains with LoRA and with several contexts: a search.

    python -m benchmarks.studies.small_search --work runs/search

It goes on with results/small_search.jsonl. Every candidate is trained as an arm of the experiments,
on a seed that the experiments do not have, and evaluated on its test examples: the share of right
answers after Fine-Tuning.
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

SEED = 9
TASK = "squad"
FULL = Variant(TASK, "gold")
FAMILIES = {
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


def _candidates() -> list[Candidate]:
    lora = [(5e-3, 0.5), (1e-2, 0.5), (2e-2, 0.5), (4e-2, 0.5), (1e-2, 2.0), (2e-2, 2.0)]
    inner = [(1e-2, 0.5), (1e-2, 2.0), (1e-2, 8.0), (2e-2, 2.0), (2e-2, 8.0), (2e-2, 32.0)]
    four = [(1e-3, 0.5), (1e-3, 1.0), (1e-3, 2.0), (1e-3, 4.0), (2e-3, 2.0)]
    sixteen = [(1e-3, 0.5), (1e-3, 2.0), (1e-3, 4.0), (1e-3, 8.0), (2e-3, 4.0)]
    rates: dict[str, tuple[list[tuple[float, float]], dict[str, int]]] = {
        "lora": (lora, {"steps": 2000}),
        "lora-inner": (inner, {"steps": 2000}),
        "contexts-4": (four, {"steps": 1600, "batch_size": 64}),
        "contexts-16": (sixteen, {"steps": 1600, "batch_size": 64}),
    }
    return [
        Candidate(family, {"outer_lr": outer, "inner_lr": inner_lr, **sizes})
        for family, (grid, sizes) in rates.items()
        for outer, inner_lr in grid
    ]


CANDIDATES = _candidates()


def preset_with(sections: dict[str, Any], candidate: Candidate, seeds: Sequence[int]) -> Preset:
    """The preset with a candidate's options in ``[train.FAMILY]``."""
    changed = copy.deepcopy(sections)
    changed["train"].setdefault(candidate.family, {}).update(candidate.options)
    changed["model"]["seeds"] = list(seeds)
    return Preset.read(changed)


def prepare(sections: dict[str, Any], work: Path, device: torch.device) -> None:
    """The stages that all candidates share."""
    changed = copy.deepcopy(sections)
    changed["model"]["seeds"] = [SEED]
    (ctx,) = experiment_contexts(Preset.read(changed), work / "shared", device)
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
    several = {
        "batched": (variant.contexts, False),
        "one after another": (variant.contexts, True),
    }
    return {"1 context": (1, False), **(several if variant.contexts > 1 else {})}


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


def best(rows: Sequence[Mapping[str, Any]], family: str) -> Mapping[str, Any]:
    """The row with the highest accuracy: of several contexts, batched."""

    def merit(row: Mapping[str, Any]) -> float:
        accuracy = row["accuracy"]
        return float(accuracy.get("batched", accuracy["1 context"]))

    return max((row for row in rows if row["family"] == family), key=merit)


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
    for family in ("lora", "lora-inner", "contexts-4", "contexts-16"):
        print(json.dumps(best(rows, family)))


if __name__ == "__main__":
    main()
