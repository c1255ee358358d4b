"""Table 1: low-rank adapters outside and inside, with the gold objective."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from . import paper
from .arms import Arm
from .by_task import Cells, chosen, table_by_task
from .findings import close
from .lab import Lab
from .measure import Question, measure, measure_at_best
from .preset import Preset, check_counts
from .results import Outcome

TITLE = "Table 1: LoRA, accuracy after Fine-Tuning"


@dataclass(frozen=True)
class Settings:
    """The section ``[table1]``: the names of the tasks, and the rank of the adapters."""

    tasks: tuple[str, ...]
    lora_rank: int

    def __post_init__(self) -> None:
        check_counts(self, "lora_rank")


def check(preset: Preset, settings: Settings) -> None:
    """Raises a ValueError if PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("table1: expected PEFT to be installed (pip install peft), got none")


def run(labs: Sequence[Lab], settings: Settings) -> Outcome:
    """Measures and compares; every seed is a lab."""
    preset, rank = labs[0].preset, settings.lora_rank
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
        arms = {
            "none": Arm(task),
            "full": Arm(task, "gold"),
            "lora": Arm(task, "gold", rank),
            "lora-inner": Arm(task, "gold", rank, "lora"),
            "untrained-lora": Arm(task, "none", rank, "lora"),
        }
        measured = {kind: measure(labs, Question(arm), metric) for kind, arm in arms.items()}
        for kind in ("none", "untrained-lora"):
            measured[f"{kind}, best"], _ = measure_at_best(labs, Question(arms[kind]), metric)
        return measured

    tasks = chosen(preset.tasks, settings.tasks)
    table, named = table_by_task(TITLE, tasks, heads, cells, paper.TABLE1)
    claim, margin = f"rank-{rank} LoRA outside does as well as full rank", preset.findings.margin
    findings = [
        close(claim, tasks[task].label, kinds["lora"], kinds["full"], margin)
        for task, kinds in named.items()
    ]
    notes = [
        "Meta-training with the gold objective. Fine-Tuning is one inner step on the context, at "
        "the rate of meta-training; of models that were not meta-trained also at their best rate, "
        "chosen on the first test examples."
    ]
    return Outcome(TITLE, [table], findings, notes)
