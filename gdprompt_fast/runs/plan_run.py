"""``gdprompt plan``: the memory that a step will need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..artifacts.files import write_json
from ..artifacts.outputs import is_marked, written_by
from ..config.fields import REQUIRED, WritingConfig, check_counts, option
from ..loading import load_config
from ..plan import (
    SHARDINGS,
    Plan,
    PlannedStep,
    make_plan,
    many_json,
    many_table,
    parse_memory,
    plan_json,
    plan_many,
    plan_table,
)
from .command import command, outputs_of
from .groups import overwrite_field, revision_field


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PlannedStep, WritingConfig):
    """Which step of which model to plan for."""

    command = "plan"

    model: str = option(
        REQUIRED, "config.json, model folder or name on the Hugging Face hub", reads=True
    )
    revision: str | None = revision_field()
    memory: str | None = option(
        None, "size of the card, as 80GB: finds the largest batch and micro-batch"
    )
    gpus: int = option(1, "GPUs among which the batch is divided")
    sharding: str = option(
        "none", "what else is: the state of the optimizer, or all weights too", SHARDINGS
    )
    json: Path | None = option(None, "JSON file to write the numbers to", writes=True)
    overwrite: bool = overwrite_field("replace a --json that this command did not write")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "gpus")


@command("The memory that a meta step will need, predicted from shapes in seconds.")
def plan(config: PlanConfig) -> Callable[[], Plan]:
    """Makes the plan; the work is to print and write it."""
    memory = None if config.memory is None else parse_memory(config.memory)
    outputs_of(config).check_file("json", config.json, lambda path: is_marked(path, "plan"))
    step, model = config.part(PlannedStep), config.model
    loaded = load_config(model, config.revision)
    many = None
    if config.gpus > 1:
        many = plan_many(loaded, step, config.gpus, config.sharding)
    made = make_plan(loaded, step, memory)

    def work() -> Plan:
        if config.json:
            numbers = plan_json(model, made) | ({} if many is None else many_json(many))
            write_json(config.json, {**written_by(config.command), **numbers})
        print(plan_table(model, made))
        if many is not None:
            print(f"\n{many_table(many)}")
        return made

    return work
