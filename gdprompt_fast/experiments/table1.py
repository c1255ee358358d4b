"""Table 1: low-rank adapters outside and inside, with the gold objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import paper
from .arms import Arm
from .findings import Named, close
from .lab import Lab
from .measure import Question, measure, measure_at_best
from .preset import METRICS, check_counts
from .results import Outcome, Table

TITLE = "Table 1: LoRA, accuracy after Fine-Tuning"
BEST = "best inner rate"


@dataclass(frozen=True)
class Settings:
    """The section ``[table1]``: the names of the tasks, and the rank of the adapters."""

    tasks: tuple[str, ...]
    lora_rank: int

    def __post_init__(self) -> None:
        check_counts(self, "lora_rank")


def run(labs: Sequence[Lab], settings: Settings) -> Outcome:
    """Measures and compares; every seed is a lab."""
    preset, rank = labs[0].preset, settings.lora_rank
    heads = {
        "none": "no meta-training",
        "full": "full rank",
        "lora": f"LoRA (rank {rank}) outside, full rank inside",
        "lora-inner": f"LoRA (rank {rank}) outside and inside",
        "untrained-lora": f"untrained LoRA (rank {rank})",
    }
    untrained = ("none", "untrained-lora")
    rows = {heads[kind]: [] for kind in heads}
    rows |= {f"{heads[kind]}, {BEST}": [] for kind in untrained}
    columns, numbers, findings = [], {}, []
    for task in settings.tasks:
        its = preset.tasks[task]
        for metric in its.metrics:
            columns.append(f"{its.label}, {METRICS[metric]}")
            cells = {
                kind: measure(labs, Question(arm), metric) for kind, arm in _arms(task, rank).items()
            }
            for kind, cell in cells.items():
                rows[heads[kind]].append(cell)
            for kind in untrained:
                question = Question(_arms(task, rank)[kind])
                rows[f"{heads[kind]}, {BEST}"].append(measure_at_best(labs, question, metric)[0])
            if metric == its.metrics[0]:
                claim = f"rank-{rank} LoRA outside does as well as full rank"
                lora, full = Named("LoRA", cells["lora"]), Named("full rank", cells["full"])
                findings.append(close(claim, its.label, lora, full, preset.findings.margin))
                for kind, number in paper.TABLE1.get(task, {}).items():
                    numbers[heads[kind], columns[-1]] = number
    notes = [
        "Fine-Tuning is one inner step on the context, at the rate of meta-training; of models "
        "that were not meta-trained also at their best rate, chosen on the first test examples."
    ]
    return Outcome(TITLE, [Table(TITLE, columns, rows, numbers)], findings, notes)


def _arms(task: str, rank: int) -> dict[str, Arm]:
    return {
        "none": Arm(task),
        "full": Arm(task, "gold"),
        "lora": Arm(task, "gold", rank),
        "lora-inner": Arm(task, "gold", rank, "lora"),
        "untrained-lora": Arm(task, "none", rank, "lora"),
    }
