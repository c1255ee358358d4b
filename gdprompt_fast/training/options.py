"""What a training does: the options of its steps, and of the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..config.fields import Config, check_counts, check_numbers, option
from ..errors import UserError
from ..evaluation import InnerStep
from ..meta.config import MetaStepConfig
from ..models.inner_params import INNER_PARAMS
from .optim import warmup_then_cosine


@dataclass(frozen=True, kw_only=True)
class StepOptions(Config):
    """What the meta-gradient of a step depends on, beside the model and the examples."""

    contexts_per_group: int = option(1, "contexts that one model is adapted to at once")
    queries_per_context: int = option(
        1, "at most so many examples with the same context share its inner step"
    )
    inner_lr: float = option(1e-3, "learning rate η of the inner step")
    inner_steps: int = option(1, "inner gradient steps on a context")
    inner_params: str = option("full", "what the inner step moves", INNER_PARAMS)
    objective: str = option(
        "kl", "match the teacher's predictions (kl) or the gold responses (gold)", ("kl", "gold")
    )
    lm_weight: float = option(0.0, "weight λ of the next-token loss")
    lm_on: str = option(
        "contexts",
        "texts of the next-token loss: contexts, or prompts with their gold responses, whole",
        ("contexts", "prompts"),
    )
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
    capture: str = option(
        "auto",
        "auto: on a GPU, steps are replayed as CUDA graphs where they can be; never: none is",
        ("auto", "never"),
        may_change=True,
    )
    seed: int = option(0, "seed of the order of the examples")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.step_config.check()
        check_counts(self, "contexts_per_group", "queries_per_context")

    @property
    def step_config(self) -> MetaStepConfig:
        """What the engine is told of the step."""
        return MetaStepConfig(
            inner_lr=self.inner_lr,
            inner_steps=self.inner_steps,
            inner_params=self.inner_params,
            objective=self.objective,
            lm_weight=self.lm_weight,
            recompute=self.recompute,
            capture=self.capture,
        )

    @property
    def inner(self) -> InnerStep:
        """The inner step, as evaluation takes it."""
        return InnerStep(self.inner_lr, self.inner_steps, self.inner_params)

    def computing(self, model: nn.Module) -> torch.autocast:
        """Inside, steps compute in ``compute_dtype``."""
        device: torch.device = next(model.parameters()).device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.compute_dtype == "bfloat16")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(StepOptions):
    """What training does; every field is an option of the command line.

    Raises:
        UserError: naming the option, what was expected and what was given.
    """

    steps: int = option(0, "outer steps; 0: one epoch")
    batch_size: int = option(
        16, "models adapted in an outer step, each to a group of contexts (one by default)"
    )
    group_by_length: bool = option(
        True, "draw batches of about equal lengths, in which little is padding"
    )
    first_order: bool = option(False, "drop the second-order term of the meta-gradient")
    micro_batch: int = option(
        0, "of those models, so many at a time, in the memory of so many; 0: all at once"
    )
    outer_lr: float = option(1e-5, "highest learning rate of Adam, reached after the warm-up")
    warmup_steps: int = option(50, "steps of linear warm-up; a cosine to zero follows")
    clip_norm: float = option(1.0, "largest norm of the meta-gradient; a larger one is scaled")
    prompt_weight: float = option(
        0.0, "weight of the responses' NLL after context and query: keeps the use of a prompt"
    )
    prompt_from: int = option(
        0, "outer step from which that counts: it is easily learnt again, and hard to learn beside"
    )
    answer_tokens: int = option(32, "longest greedy answer of the teacher, in tokens (kl)")
    teacher_batch_size: int = option(32, "examples that the teacher answers at once (kl)")
    checkpoint_every: int = option(200, "steps between checkpoints")
    sharding: str = option(
        "none",
        "optimizer: of several processes each has its part of Adam's state; full: of the weights "
        "too",
        ("none", "optimizer", "full"),
        may_change=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "batch_size", "answer_tokens", "teacher_batch_size", "checkpoint_every")
        check_numbers(self, "outer_lr", "clip_norm", above_zero=True)
        check_numbers(self, "steps", "warmup_steps", "micro_batch", above_zero=False)
        check_numbers(self, "prompt_weight", "prompt_from", above_zero=False)
        if self.sharding == "full" and self.recompute != "block":
            raise UserError(
                f'recompute: expected "block" with sharding "full", got "{self.recompute}"'
            )
        if self.prompt_weight > 0 and 0 < self.steps <= self.prompt_from:
            raise UserError(
                f"prompt_from: expected one of the {self.steps} steps, counted from 0, "
                f"got {self.prompt_from}"
            )

    @property
    def step_config(self) -> MetaStepConfig:
        return replace(
            super().step_config,
            first_order=self.first_order,
            micro_groups=self.micro_batch or None,
        )

    @property
    def contexts(self) -> int:
        """The number of contexts in an outer step."""
        return self.batch_size * self.contexts_per_group

    def with_resolved_steps(self, contexts: int) -> TrainOptions:
        """The same options with the steps of one epoch of so many contexts where they were 0."""
        return self if self.steps else replace(self, steps=math.ceil(contexts / self.contexts))

    def learning_rate(self, step: int) -> float:
        """Adam's rate at ``step``, counted from 0: a linear warm-up, then a cosine to zero."""
        return warmup_then_cosine(step, self.steps, self.warmup_steps, self.outer_lr)
