"""Meta-training: Adam on the gradients of ``fast_meta_step``, from any point to the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import write_folder
from ..artifacts.progress import progress_bar
from ..config.fields import check_integers, option
from ..data import Example, ShuffledSampler, meta_batch, prompt_rows, units_by_context
from ..errors import UserError
from ..evaluation import InnerStep
from ..meta.config import MetaStepOutput, check_inner
from ..meta.step import fast_meta_step
from ..meta.targets import TeacherTargets
from ..teacher import TeacherCache
from .checkpoint import (
    MODEL_FOLDER,
    MetricsLog,
    check_checkpoint,
    check_metrics,
    load_checkpoint,
    save_checkpoint,
    save_model,
)
from .prepare import fine_tuning_backward, row_loss
from .schedule import warmup_then_cosine

METRICS_FILE = "metrics.jsonl"
LOSS = "query_loss"  # the curve that is drawn
COUNTS = (
    "batch_size",
    "contexts_per_group",
    "queries_per_context",
    "answer_tokens",
    "teacher_batch_size",
    "checkpoint_every",
)


@dataclass(frozen=True)
class TrainOptions:
    """What training does; every field is an option of the command line.

    Raises:
        ValueError: naming the option, what was expected and what was given.
    """

    steps: int = option(0, "outer steps; 0: one epoch")
    batch_size: int = option(
        16, "models adapted in an outer step, each to a group of contexts (one by default)"
    )
    micro_batch: int = option(
        0, "of those models, so many at a time, in the memory of so many; 0: all at once"
    )
    contexts_per_group: int = option(1, "contexts that one model is adapted to at once")
    queries_per_context: int = option(
        1, "at most so many examples with the same context share its inner step"
    )
    outer_lr: float = option(1e-5, "highest learning rate of Adam, reached after the warm-up")
    warmup_steps: int = option(50, "steps of linear warm-up; a cosine to zero follows")
    clip_norm: float = option(1.0, "largest norm of the meta-gradient; a larger one is scaled")
    inner_lr: float = option(1e-3, "learning rate η of the inner step")
    inner_steps: int = option(1, "inner gradient steps on a context")
    inner_params: str = option("full", "what the inner step moves", ("full", "lora"))
    objective: str = option(
        "kl", "match the teacher's predictions (kl) or the gold responses (gold)", ("kl", "gold")
    )
    lm_weight: float = option(0.0, "weight λ of the next-token loss")
    lm_on: str = option(
        "contexts",
        "texts of the next-token loss: contexts, or prompts with their gold responses, whole",
        ("contexts", "prompts"),
    )
    prompt_weight: float = option(
        0.0, "weight of the responses' NLL after context and query: keeps the use of a prompt"
    )
    prompt_from: int = option(
        0, "outer step from which that counts: it is easily learnt again, and hard to learn beside"
    )
    answer_tokens: int = option(32, "longest greedy answer of the teacher, in tokens (kl)")
    teacher_batch_size: int = option(32, "examples that the teacher answers at once (kl)")
    compute_dtype: str = option(
        "float32",
        "bfloat16: activations, products and the teacher in it, beside float32 weights",
        ("float32", "bfloat16"),
    )
    recompute: str = option(
        "none",
        "block: half to four fifths of the memory, 1.4 to 1.6 times the time",
        ("none", "block"),
    )
    checkpoint_every: int = option(200, "steps between checkpoints")
    seed: int = option(0, "seed of the order of the examples")

    def __post_init__(self) -> None:
        check_integers(self)
        check_inner(self.inner_lr, self.inner_steps)
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        for name in ("outer_lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        for name in (
            "steps",
            "warmup_steps",
            "micro_batch",
            "lm_weight",
            "prompt_weight",
            "prompt_from",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if self.prompt_weight > 0 and 0 < self.steps <= self.prompt_from:
            raise UserError(
                f"prompt_from: expected one of the {self.steps} steps, counted from 0, "
                f"got {self.prompt_from}"
            )
        for each in fields(self):
            choices, given = each.metadata["choices"], getattr(self, each.name)
            if choices is not None and given not in choices:
                raise UserError(f"{each.name}: expected one of {choices}, got {given!r}")

    @property
    def inner(self) -> InnerStep:
        """The inner step, as evaluation takes it."""
        return InnerStep(self.inner_lr, self.inner_steps, self.inner_params)

    @property
    def contexts(self) -> int:
        """The number of contexts in an outer step."""
        return self.batch_size * self.contexts_per_group

    def counted(self, contexts: int) -> TrainOptions:
        """The same options with the steps of one epoch of so many contexts where they were 0."""
        return self if self.steps else replace(self, steps=math.ceil(contexts / self.contexts))

    def learning_rate(self, step: int) -> float:
        """Adam's rate at ``step``, counted from 0: a linear warm-up, then a cosine to zero."""
        return warmup_then_cosine(step, self.steps, self.warmup_steps, self.outer_lr)


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: TrainOptions,
    output: Path,
    teacher: TeacherCache | None = None,
    joint: Sequence[Example] | None = None,
) -> None:
    """Meta-trains ``model`` in place, from the newest checkpoint in ``output`` if there is one.

    Writes ``metrics.jsonl`` (a row a step), the same for TensorBoard if that is installed,
    ``checkpoints/`` (the newest one) and, at the end, ``model/``. On a CPU a run that was killed
    and continued ends with the very bits of one that was not: the losses of a step follow from its
    number and the weights alone.

    Args:
        model: its parameters with ``requires_grad`` are trained; put in eval mode, because a meta
            step with dropout is not defined.
        teacher: what the frozen teacher answers to these very examples, for the KL objective; None
            for the gold objective.
        joint: examples for joint training: every step adds the ordinary fine-tuning loss, in the
            Prompt and No Context formats, of ``batch_size`` of them.

    Raises:
        ValueError: if the teacher does not go with the objective or the examples.
        FloatingPointError: if a loss or the meta-gradient is not finite.
    """
    _check_teacher(teacher, examples, options)
    model.eval()
    units = units_by_context(examples, options.queries_per_context)
    options = options.counted(len(units))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=options.outer_lr)
    optimizer.zero_grad()  # what a training that diverged has left in .grad
    samplers = {"contexts": ShuffledSampler(len(units), options.seed)}
    if joint is not None:
        samplers["joint"] = ShuffledSampler(len(joint), f"{options.seed} joint")
    output.mkdir(parents=True, exist_ok=True)
    check_training(output)
    start = load_checkpoint(output, model, optimizer, samplers)
    began, tokens = time.perf_counter(), 0
    with (
        closing(MetricsLog(output / METRICS_FILE, start)) as metrics,
        progress_bar(options.steps, "meta-training", "step", done=start) as bar,
    ):
        for step in range(start, options.steps):
            drawn = [units[index] for index in samplers["contexts"].take(options.contexts)]
            answered, targets = _answered(examples, drawn, teacher)
            arguments = step_arguments(model, examples, drawn, answered, targets, options)
            with computing(model, options):  # adds the meta-gradient of the batch to .grad
                losses = fast_meta_step(
                    model, **arguments, micro_groups=options.micro_batch or None
                )
            row = _row(step, losses, options)
            if options.prompt_weight > 0 and step >= options.prompt_from:
                row["prompt_loss"] = _prompt_backward(model, answered, options)
            if joint is not None:
                batch = [joint[index] for index in samplers["joint"].take(options.batch_size)]
                with computing(model, options):
                    row["joint_loss"] = fine_tuning_backward(model, batch)
            row["gradient_norm"] = _update(optimizer, trained, options, step)
            metrics.write(row)
            tokens += _tokens(examples, drawn)
            bar.set_postfix_str(
                f"loss {row['outer_loss']:.3f}, inner {row['inner_loss']:.3f}, "
                f"{tokens / (time.perf_counter() - began):,.0f} tokens/s",
                refresh=False,
            )
            bar.update()
            if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
                metrics.to_disk()
                save_checkpoint(output, step + 1, model, tokenizer, optimizer, samplers)
    write_folder(output / MODEL_FOLDER, lambda folder: save_model(model, tokenizer, folder))


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
    teacher: TeacherCache | None, examples: Sequence[Example], options: TrainOptions
) -> None:
    if (teacher is not None) != (options.objective == "kl"):
        raise UserError(
            f'teacher: expected a TeacherCache with objective "kl" and None with "gold", got '
            f'{type(teacher).__name__} with "{options.objective}"'
        )
    if teacher is not None and teacher.examples != list(examples):
        raise UserError("teacher: expected a TeacherCache of the examples, got one of others")


def _answered(
    examples: Sequence[Example], units: Sequence[Sequence[int]], teacher: TeacherCache | None
) -> tuple[list[Example], TeacherTargets | None]:
    """The examples of a batch; with a teacher, with its answers in the place of the responses."""
    indices = [index for unit in units for index in unit]
    if teacher is None:
        return [examples[index] for index in indices], None
    return teacher.batch(indices)


def step_arguments(
    model: nn.Module,
    examples: Sequence[Example],
    units: Sequence[Sequence[int]],
    answered: Sequence[Example],
    targets: TeacherTargets | None,
    options: TrainOptions,
) -> dict[str, Any]:
    """What training gives :func:`gdprompt_fast.fast_meta_step` beside the model: of examples in
    units with one context each, ``contexts_per_group`` neighbours share one θ'.
    """
    device: torch.device = next(model.parameters()).device
    lm_batch = None
    if options.lm_on == "prompts" and options.lm_weight > 0:
        prompts = prompt_rows([examples[index] for unit in units for index in unit]).to(device)
        lm_batch = (prompts.ids, prompts.mask)
    context_of = [number for number, unit in enumerate(units) for _ in unit]
    return dict(
        batch=meta_batch(answered, context_of, options.contexts_per_group).to(device),
        inner_lr=options.inner_lr,
        inner_steps=options.inner_steps,
        inner_params=options.inner_params,
        objective=options.objective,
        teacher=targets,
        lm_weight=options.lm_weight,
        lm_batch=lm_batch,
        recompute=options.recompute,
    )


def _prompt_backward(model: nn.Module, answered: Sequence[Example], options: TrainOptions) -> float:
    """The mean NLL of the responses with the context in the prompt; adds the gradient of
    ``prompt_weight`` times that to ``.grad``.
    """
    device: torch.device = next(model.parameters()).device
    with computing(model, options):
        loss = row_loss(model, prompt_rows(answered).to(device))
    (options.prompt_weight * loss).backward()
    return float(loss.detach())


def _update(
    optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], options: TrainOptions, step: int
) -> float:
    """A step of Adam on ``.grad``, which it clips and clears; the norm before that.

    Raises:
        FloatingPointError: if the norm is not finite; the weights are untouched.
    """
    norm = float(torch.nn.utils.clip_grad_norm_(trained, options.clip_norm))
    if not math.isfinite(norm):
        raise FloatingPointError(f"meta-gradient: its norm is {norm} at step {step}")
    for group in optimizer.param_groups:
        group["lr"] = options.learning_rate(step)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def computing(model: nn.Module, options: TrainOptions) -> torch.autocast:
    """Inside, steps compute in ``compute_dtype``."""
    device: torch.device = next(model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=options.compute_dtype == "bfloat16")


def _tokens(examples: Sequence[Example], units: Sequence[Sequence[int]]) -> int:
    """The tokens in the contexts and the query rows of a batch."""
    contexts = sum(len(examples[unit[0]].context) for unit in units)
    rows = (examples[index] for unit in units for index in unit)
    return contexts + sum(len(example.query) + len(example.response) for example in rows)


def _row(step: int, losses: MetaStepOutput, options: TrainOptions) -> dict[str, float]:
    return {
        "step": step + 1,
        "learning_rate": options.learning_rate(step),
        "outer_loss": float(losses.outer_loss),
        "query_loss": float(losses.query_loss),
        "lm_loss": float(losses.lm_loss),
        "inner_loss": float(losses.inner_loss),
    }
