"""``gdprompt check``, and the same check before ``gdprompt train`` takes its first step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ..artifacts.files import write_json
from ..artifacts.outputs import is_marked, written_by
from ..config.fields import check_counts, option
from ..data import Example, prompt_rows, units_by_context
from ..errors import UserError
from ..exactness.check import check_exactness
from ..exactness.report import CANNOT_TELL, NOT_EXACT, ExactnessReport
from ..loading import add_lora, positions
from ..meta.targets import TeacherTargets
from ..models.inner_params import select_inner
from ..teacher import Teacher
from ..training.metrics import METRICS_FILE
from ..training.options import StepOptions
from ..training.step_data import StepData
from .command import command, outputs_of
from .groups import ExamplesConfig, ModelConfig, dtype_field, lora_rank_field, overwrite_field
from .job import Job
from .reading import Reader, write_dropped

# Cosines with the exact one below which a meta-gradient in bf16 deserves a warning.
GOOD_GRADIENT, GOOD_SECOND_ORDER = 0.95, 0.9
# The cosine with the exact one below which the first-order meta-gradient trains something else.
NEAR = 0.9


@dataclass(frozen=True, kw_only=True)
class CheckConfig(StepOptions, ExamplesConfig, ModelConfig):
    """Which step to check, on which model and examples."""

    command = "check"

    dtype: str = dtype_field()
    examples: int = option(2, "take the first so many records")
    lora_rank: int = lora_rank_field()
    json: Path | None = option(None, "JSON file to write the report to", writes=True)
    overwrite: bool = overwrite_field("replace a --json that this command did not write")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "examples")


@command(
    "Whether the engine's meta-gradient is this model's exact one: against the model's own "
    "forward, whatever was changed in it. Exit code 0: it is; 1: it is not, or cannot be told.",
    succeeded=lambda report: report.exact,
)
def check(config: CheckConfig) -> Callable[[], ExactnessReport]:
    """Loads model and examples; the work is to check, and to print and write the report."""
    outputs_of(config).check_file("json", config.json, lambda path: is_marked(path, "check"))
    options = config.part(StepOptions)
    model, tokenizer = config.load(config.dtype)
    if config.lora_rank:
        model = add_lora(model, config.lora_rank, options.seed)
    select_inner(model, options.inner_params)
    reader = Reader.of(config)
    chosen = reader.examples(config.data, model, tokenizer, config.limits(positions(model)))
    chosen = chosen[: config.examples]
    print(f"checking on {len(chosen)}")

    def work() -> ExactnessReport:
        write_dropped(config.dropped, config.command, reader.dropped)
        units = units_by_context(chosen, options.queries_per_context)
        data = StepData.of(chosen, units, teacher=None)
        if options.objective == "kl":
            data = replace(data, targets=_own_targets(model, data.answered))
        report = _check(model, data, options)
        if config.json:
            write_json(config.json, {**written_by(config.command), **report.to_json()})
        print(f"\n{report.table()}")
        for sentence in (*_about_bf16(report), *_about_first_order(report)):
            print(f"- {sentence}")
        return report

    return work


def check_before_training(job: Job, teacher: Teacher | None, output: Path) -> None:
    """Checks the step on the first context of a run that has not started.

    Raises:
        UserError: if the engine is not exact on the model.
    """
    if (output / METRICS_FILE).exists():
        return
    job.model.eval()
    units = units_by_context(job.examples, job.options.queries_per_context)[:1]
    data = StepData.of(job.examples, units, teacher, (job.texts or [])[:1])
    report = _check(job.model, data, job.options)
    if report.verdict == NOT_EXACT:
        raise UserError(
            "check: expected the exact meta-gradient of this model, got another: "
            f"{report.reasons[0]} gdprompt check shows all; --no-check trains with it anyway"
        )
    warnings = [*report.reasons, *report.suggestions] if report.verdict == CANNOT_TELL else []
    if job.options.compute_dtype == "bfloat16":
        warnings += _about_bf16(report)
    for sentence in warnings:
        print(f"warning: check: {sentence}", file=sys.stderr)


def _check(model: nn.Module, data: StepData, options: StepOptions) -> ExactnessReport:
    """The check of the step that training takes on this data."""
    with options.computing(model):
        return check_exactness(model, **data.arguments(model, options), **vars(options.step_config))


def _own_targets(model: nn.Module, examples: Sequence[Example]) -> TeacherTargets:
    """What the model predicts of the gold responses with the context in its prompt."""
    rows = prompt_rows(examples).to(next(model.parameters()).device)
    return TeacherTargets.from_model(model, rows.ids, rows.mask, rows.response_mask)


def _about_bf16(report: ExactnessReport) -> list[str]:
    """A sentence where bf16 gives another gradient."""
    if report.precision is None:
        return []
    gradient, second_order = report.precision.gradient[0], report.precision.second_order[0]
    if gradient >= GOOD_GRADIENT and second_order >= GOOD_SECOND_ORDER:
        return []
    return [
        f"In bfloat16 the meta-gradient has a cosine of {gradient:.3f} with the exact one, its "
        f"second-order term of {second_order:.3f}: compute in float32."
    ]


def _about_first_order(report: ExactnessReport) -> list[str]:
    """The rule of thumb of docs/second-order.md, at this model and rate."""
    if report.precision is None:
        return []
    cosine = report.precision.first_order[0]
    first_order = f"First order has a cosine of {cosine:.3f} with the exact meta-gradient"
    if cosine < NEAR:
        return [f"{first_order}: it would train something else."]
    return [
        f"{first_order}, but of an untrained model that says little: where it was measured it fell "
        "from 0.999 to a half in 150 steps. First order learnt only where Fine-Tuning answered "
        "queries right before training."
    ]
