"""``gdprompt check``, and the same check before ``gdprompt train`` takes its first step."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from ..artifacts.files import write_json
from ..artifacts.outputs import written_by
from ..data import Example, prompt_rows, units_by_context
from ..errors import UserError
from ..exactness.check import check_exactness
from ..exactness.report import CANNOT_TELL, NOT_EXACT, ExactnessReport
from ..loading import add_lora, choose_device, load_model, positions, print_notes
from ..meta.targets import TeacherTargets
from ..models.inner_params import select_inner
from ..teacher import TeacherCache
from ..training.loop import METRICS_FILE, TrainOptions, computing, step_arguments
from .job import Job, hub_and_weights, limits
from .reading import Reader, write_dropped

# The options of training on which the meta-gradient depends.
CHECKED = (
    *("objective", "inner_lr", "inner_steps", "inner_params", "lm_weight", "lm_on"),
    *("contexts_per_group", "queries_per_context", "compute_dtype", "recompute", "seed"),
)
# Cosines with the exact one below which a meta-gradient in bf16 deserves a warning.
GOOD_GRADIENT, GOOD_SECOND_ORDER = 0.95, 0.9


def prepare_exactness(args: Namespace, options: TrainOptions) -> Callable[[], int]:
    """Everything before the long work of ``gdprompt check``, which returns the exit code: 0 if the
    engine is exact, 1 otherwise.

    Raises:
        ValueError: naming the option, what was expected and what was given.
    """
    if args.examples < 1:
        raise UserError(f"examples: expected an integer >= 1, got {args.examples}")
    device = choose_device(args.device)
    model, tokenizer = load_model(args.model, args.dtype, device, **hub_and_weights(args))
    print_notes(model, tokenizer)
    if args.lora_rank:
        model = add_lora(model, args.lora_rank, options.seed)
    select_inner(model, options.inner_params)
    reader = Reader.of(args)
    chosen = reader.examples(args.data, model, tokenizer, limits(args, positions(model)))
    chosen = chosen[: args.examples]
    print(f"checking on {len(chosen)}")

    def work() -> int:
        write_dropped(args.dropped, args.command, reader.dropped)
        units = units_by_context(chosen, options.queries_per_context)
        answered = [chosen[index] for unit in units for index in unit]
        targets = _own_targets(model, answered) if options.objective == "kl" else None
        report = _check(model, chosen, units, answered, targets, options)
        if args.json:
            write_json(args.json, {**written_by(args.command), **report.to_json()})
        print(f"\n{report.table()}")
        for sentence in _about_bf16(report):
            print(f"- {sentence}")
        return 0 if report.exact else 1

    return work


def check_before_training(job: Job, teacher: TeacherCache | None, output: Path) -> None:
    """Checks the step on the first context of a run that has not started.

    Raises:
        UserError: if the engine is not exact on the model.
    """
    if (output / METRICS_FILE).exists():
        return
    job.model.eval()
    units = units_by_context(job.examples, job.options.queries_per_context)[:1]
    answered, targets = [job.examples[index] for index in units[0]], None
    if teacher is not None:
        answered, targets = teacher.batch(units[0])
    report = _check(job.model, job.examples, units, answered, targets, job.options)
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


def _check(
    model: nn.Module,
    examples: Sequence[Example],
    units: Sequence[Sequence[int]],
    answered: Sequence[Example],
    targets: TeacherTargets | None,
    options: TrainOptions,
) -> ExactnessReport:
    """The check of the step that training takes on these units."""
    arguments = step_arguments(model, examples, units, answered, targets, options)
    with computing(model, options):
        return check_exactness(model, **arguments)


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
