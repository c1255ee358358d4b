"""Table 1: low-rank adapters outside and inside, with the gold objective."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from ..config.fields import Config, check_counts
from ..errors import UserError
from ..report.findings import close, larger
from ..report.outcome import Outcome
from . import paper
from .by_task import Cells, better_base, chosen, table_by_task
from .context import ExperimentContext
from .forgetting import text_tables
from .measure import EvalSpec, measure, measure_at_best
from .preset import Preset
from .variants import Variant

TITLE = "Table 1: LoRA, accuracy after Fine-Tuning"
TRAINED = ("none", "full", "lora", "lora-inner")  # an untrained adapter leaves the model as it is


@dataclass(frozen=True)
class Options(Config):
    """The section ``[table1]``: the names of the tasks, and the rank of the adapters."""

    tasks: tuple[str, ...]
    lora_rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "lora_rank")


def check(preset: Preset, options: Options) -> None:
    """Raises a ValueError if PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("table1: expected PEFT to be installed (pip install peft), got none")


def run(repetitions: Sequence[ExperimentContext], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    preset, rank = repetitions[0].preset, options.lora_rank
    heads = {
        "none": "no meta-training",
        "none, best": "no meta-training, best inner rate",
        "full": "full rank",
        "lora": f"LoRA (rank {rank}) outside, full rank inside",
        "lora-inner": f"LoRA (rank {rank}) outside and inside",
        "untrained-lora": f"untrained LoRA (rank {rank})",
        "untrained-lora, best": f"untrained LoRA (rank {rank}), best inner rate",
    }

    def cells(task: str, metric: str) -> Cells:
        specs = {kind: EvalSpec(variant) for kind, variant in _kinds(task, rank).items()}
        measured = {kind: measure(repetitions, spec, metric) for kind, spec in specs.items()}
        for kind in ("none", "untrained-lora"):
            measured[f"{kind}, best"], _ = measure_at_best(repetitions, specs[kind], metric)
        return measured

    tasks = chosen(preset.tasks, options.tasks)
    table, named = table_by_task(TITLE, tasks, heads, cells, paper.TABLE1)
    claim, margin = f"rank-{rank} LoRA outside does as well as full rank", preset.findings.margin
    findings = [
        close(claim, tasks[task].label, kinds["lora"], kinds["full"], margin)
        for task, kinds in named.items()
    ]
    claim = f"rank-{rank} LoRA outside and inside is better than no meta-training"
    findings += [
        larger(claim, tasks[task].label, kinds["lora-inner"], better_base(kinds))
        for task, kinds in named.items()
    ]
    columns = {
        tasks[task].label: {heads[kind]: _kinds(task, rank)[kind] for kind in TRAINED}
        for task in tasks
    }
    forgotten, about_it = text_tables(repetitions, columns, heads["none"])
    notes = [
        "Meta-training with the gold objective. Fine-Tuning is one inner step on the context, at "
        "the rate of meta-training; of models that were not meta-trained also at their best rate, "
        "chosen on the first test examples."
    ]
    return Outcome(TITLE, [table, *forgotten], [*findings, *about_it], notes)


def variants(preset: Preset, options: Options) -> list[Variant]:
    """All that it compares."""
    kinds = (_kinds(task, options.lora_rank) for task in options.tasks)
    return [variant for of_task in kinds for variant in of_task.values()]


def _kinds(task: str, rank: int) -> dict[str, Variant]:
    return {
        "none": Variant(task),
        "full": Variant(task, "gold"),
        "lora": Variant(task, "gold", rank),
        "lora-inner": Variant(task, "gold", rank, "lora"),
        "untrained-lora": Variant(task, "none", rank, "lora"),
    }
