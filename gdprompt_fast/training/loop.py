"""Meta-training: Adam on the gradients of ``fast_meta_step``, from any point to the end."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.progress import progress_bar
from ..data import (
    Example,
    LengthSampler,
    Sampler,
    ShuffledSampler,
    prompt_rows,
    prompt_sizes,
    step_sizes,
    units_by_context,
)
from ..distributed.group import barrier, world_size
from ..distributed.group import share as own_items
from ..distributed.sharded import is_sharded
from ..errors import UserError
from ..evaluation.held_out import HeldOut
from ..meta.capture import why_eager
from ..meta.config import MetaStepOutput
from ..meta.step import fast_meta_step
from ..teacher import Teacher
from .best import BestModel
from .checkpoint import (
    MODEL_FOLDER,
    check_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_model,
    write_together,
)
from .finetune import fine_tuning_backward, row_backward
from .late import LateNumbers, Numbers
from .metrics import LOSS, METRICS_FILE, MetricsLog, check_metrics
from .optim import ClippedAdam, check_norm
from .options import TrainOptions
from .share import Share, check_alike
from .step_data import LeastSizes, StepData, positions_of


def meta_train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: TrainOptions,
    output: Path,
    teacher: Teacher | None = None,
    joint: Sequence[Example] | None = None,
    texts: Sequence[array[int]] | None = None,
    held_out: HeldOut | None = None,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Meta-trains ``model`` in place, from the newest checkpoint in ``output`` if there is one.

    Writes ``metrics.jsonl`` (a row a step), the same for TensorBoard if that is installed,
    ``checkpoints/`` (the newest one), with ``held_out`` ``best/`` and, at the end, ``model/``. On a
    CPU a run that was killed and continued ends with the very bits of one that was not: the losses
    of a step follow from its number and the weights alone. Of several processes
    (:func:`gdprompt_fast.distributed.launched`) each takes a share of every step, which give what
    one gives up to the order of sums.

    Args:
        model: its parameters with ``requires_grad`` are trained; put in eval mode, because a meta
            step with dropout is not defined.
        teacher: what the frozen teacher answers to these very examples, for the KL objective; None
            for the gold objective.
        joint: examples for joint training: every step adds the ordinary fine-tuning loss, in the
            Prompt and No Context formats, of ``batch_size`` of them.
        texts: rows of running text, of which every step draws as many as contexts for L_LM, in the
            place of what ``lm_on`` says.
        held_out: what to measure on as training goes; the model that does best there is kept.
        watch: called with the number of steps done, before the first step and after each; it must
            leave the model as it is.

    Raises:
        ValueError: if the teacher does not go with the objective or the examples.
        FloatingPointError: if a loss or the meta-gradient is not finite.
    """
    _check_teacher(teacher, examples, options)
    model.eval()
    units = units_by_context(examples, options.queries_per_context)
    options = options.with_resolved_steps(len(units))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = ClippedAdam(trained, options.clip_norm, sharded=options.sharding == "optimizer")
    late = LateNumbers(trained[0].device)
    ladder = not why_eager(model, options.step_config, trained[0].device)
    least = LeastSizes.of(examples, options)
    samplers = _samplers([[examples[index] for index in unit] for unit in units], joint, options)
    if texts:
        samplers["texts"] = ShuffledSampler(len(texts), f"{options.seed} texts")
    output.mkdir(parents=True, exist_ok=True)
    check_training(output)
    start = load_checkpoint(output, model, optimizer, samplers)
    check_alike(model, start, chain(examples, joint or (), texts or (), [options]))
    best = BestModel(output, check_metrics(output / METRICS_FILE, start))
    with (
        closing(MetricsLog(output / METRICS_FILE, start)) as metrics,
        progress_bar(options.steps, "meta-training", "step", done=start) as bar,
    ):
        report = _Report(metrics, bar)
        if watch is not None:
            watch(start)
        for step in range(start, options.steps):
            drawn = [units[index] for index in samplers["contexts"].take(options.contexts)]
            rows = [texts[i] for i in samplers["texts"].take(options.contexts)] if texts else None
            share = Share.of(drawn, options, rows)
            data = StepData.of(examples, share.units, teacher, share.texts)
            beside = []
            if joint is not None:
                beside = [joint[index] for index in samplers["joint"].take(options.batch_size)]
            arguments = data.arguments(model, options, ladder, least)
            losses = _meta_backward(model, {**arguments, **share.counts}, options)
            row = _row(step, losses, options)
            own = _backward_beside(model, data, beside, options, step, share)
            if not is_sharded(model):  # whose step gives the losses of all processes
                own |= row
            sizes = options.step_config.micro_groups, ladder
            positions = positions_of(arguments["batch"], *sizes)
            row |= share.of_all(own, *positions, like=losses.query_loss)
            row["gradient_norm"] = optimizer.update(row["learning_rate"], step, row["found_inf"])
            measured = {}
            if held_out is not None and held_out.is_due(step + 1, options.steps):
                measured = held_out.numbers(model, tokenizer, options.inner)
            late.add({**row, **measured}, partial(report, losses, data.tokens * world_size()))
            if measured:
                late.read_all()  # a step that failed is never saved
                best.keep(step + 1, measured, model, tokenizer)
            bar.update()
            if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
                late.read_all()  # a step that failed is never saved
                metrics.to_disk()
                save_checkpoint(output, step + 1, model, tokenizer, optimizer, samplers)
            if watch is not None:
                watch(step + 1)
    barrier()
    write_together(
        output / MODEL_FOLDER, model, lambda folder: save_model(model, tokenizer, folder)
    )


class _Report:
    """What is done with the numbers of a step: they are checked, written and shown."""

    def __init__(self, metrics: MetricsLog, bar: Any) -> None:
        self._metrics, self._bar = metrics, bar
        self._began, self._tokens = time.perf_counter(), 0

    def __call__(self, losses: MetaStepOutput, tokens: int, numbers: Numbers) -> None:
        """
        Raises:
            FloatingPointError: if the step was not finite.
        """
        if numbers.pop("found_inf"):
            losses.check()
            raise FloatingPointError("step: expected finite numbers, got others in a process")
        check_norm(numbers["gradient_norm"], int(numbers["step"]) - 1)
        self._metrics.write(numbers)
        self._tokens += tokens
        self._bar.set_postfix_str(
            f"loss {numbers['outer_loss']:.3f}, inner {numbers['inner_loss']:.3f}, "
            f"{self._tokens / (time.perf_counter() - self._began):,.0f} tokens/s",
            refresh=False,
        )


def check_training(output: Path) -> None:
    """That what a training has left in ``output`` can be gone on with.

    Raises:
        ValueError: naming the file, and its line, that is not as it was written.
    """
    path = output / METRICS_FILE
    for number, row in enumerate(check_metrics(path, check_checkpoint(output)), start=1):
        if LOSS not in row:
            raise UserError(f'{path}, line {number}: expected a "{LOSS}", got none')


def _check_teacher(
    teacher: Teacher | None, examples: Sequence[Example], options: TrainOptions
) -> None:
    if (teacher is not None) != (options.objective == "kl"):
        raise UserError(
            f'teacher: expected a Teacher with objective "kl" and None with "gold", got '
            f'{type(teacher).__name__} with "{options.objective}"'
        )
    if teacher is not None and teacher.examples != list(examples):
        raise UserError("teacher: expected one of the examples, got one of others")


def _samplers(
    units: Sequence[Sequence[Example]], joint: Sequence[Example] | None, options: TrainOptions
) -> dict[str, Sampler]:
    """What draws contexts in their units, and, if there are any, examples of joint training."""
    seeds = options.seed, f"{options.seed} joint"
    if not options.group_by_length:
        samplers: dict[str, Sampler] = {"contexts": ShuffledSampler(len(units), seeds[0])}
        if joint is not None:
            samplers["joint"] = ShuffledSampler(len(joint), seeds[1])
        return samplers
    groups = options.contexts, options.contexts_per_group
    samplers = {"contexts": LengthSampler(step_sizes(units), seeds[0], *groups)}
    if joint is not None:
        samplers["joint"] = LengthSampler(prompt_sizes(joint), seeds[1], options.batch_size)
    return samplers


def _meta_backward(
    model: nn.Module, arguments: dict[str, Any], options: TrainOptions
) -> MetaStepOutput:
    """Adds the meta-gradient to ``.grad``."""
    with options.computing(model):
        return fast_meta_step(model, **arguments, config=options.step_config)


def _backward_beside(
    model: nn.Module,
    data: StepData,
    joint: Sequence[Example],
    options: TrainOptions,
    step: int,
    share: Share,
) -> dict[str, Tensor]:
    """Adds the gradient of what else is trained on to ``.grad``; its losses, by name, of this
    process's share.
    """
    losses = {}
    if options.prompt_weight > 0 and step >= options.prompt_from:
        count = share.counts["query_count"]
        losses["prompt_loss"] = _prompt_backward(model, data.answered, options, count)
    if joint:
        own = own_items(joint)
        with options.computing(model):
            losses["joint_loss"] = fine_tuning_backward(model, own, count=len(joint))
    return losses


def _prompt_backward(
    model: nn.Module, answered: Sequence[Example], options: TrainOptions, count: int
) -> Tensor:
    """The share of some examples in the mean over ``count`` of the NLL of the responses with the
    context in the prompt, detached; adds the gradient of ``prompt_weight`` times that to ``.grad``.
    """
    rows = prompt_rows(answered) if answered else None
    with options.computing(model):
        return row_backward(model, rows, options.prompt_weight, count=count)


def _row(step: int, losses: MetaStepOutput, options: TrainOptions) -> dict[str, Any]:
    return {
        "step": step + 1,
        "learning_rate": options.learning_rate(step),
        "outer_loss": losses.outer_loss,
        "query_loss": losses.query_loss,
        "lm_loss": losses.lm_loss,
        "inner_loss": losses.inner_loss,
        "found_inf": losses.found_inf,
    }
