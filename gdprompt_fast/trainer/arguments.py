"""The arguments of a MetaTrainer: transformers' own, and those of the meta step."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from ..config.fields import check_counts
from ..data import Limits
from ..errors import UserError
from ..meta.config import MetaStepConfig
from ..models.inner_params import INNER_PARAMS
from .refused import check_arguments


def _argument(default: Any, help: str) -> Any:
    """A field as HfArgumentParser reads it."""
    return field(default=default, metadata={"help": help})


@dataclass
class MetaTrainingArguments(TrainingArguments):
    """transformers' ``TrainingArguments`` with the options of the meta step.

    Those from ``inner_lr`` to ``capture`` are the fields of :class:`MetaStepConfig`, with the same
    meaning and defaults. ``remove_unused_columns`` is off.

    Raises:
        UserError: naming an option of the step that is not as expected, or an argument of
            transformers' that a meta step cannot be trained with, and why.
    """

    inner_lr: float = _argument(1e-3, "learning rate η of the inner step")
    inner_steps: int = _argument(1, "inner gradient steps on a context")
    inner_params: str = _argument("full", "what the inner step moves: full, linear or lora")
    objective: str = _argument("kl", "match the teacher's answers (kl) or the responses (gold)")
    outer_reduction: str = _argument("sum", "over the tokens of a response: sum or mean")
    lm_weight: float = _argument(0.0, "weight λ of the next-token loss on the contexts")
    first_order: bool = _argument(False, "drop the second-order term")
    backend: str = _argument("auto", "auto, torch, cpp or triton")
    recompute: str = _argument("none", "block: less memory, more time, the same gradient")
    verify: str = _argument("first", "first: holds the model against the engine; never")
    micro_groups: int | None = _argument(None, "so many examples of a batch at a time; None: all")
    capture: str = _argument("auto", "auto: steps on a GPU are replayed as CUDA graphs; never")

    answer_tokens: int = _argument(32, "longest greedy answer of the teacher, in tokens (kl)")
    teacher_batch_size: int = _argument(32, "examples that the teacher answers at once (kl)")
    teacher_cache: str | None = _argument(
        None, "folder of the teacher's answers (kl); None: _teacher in output_dir"
    )
    chat_template: bool = _argument(False, "ask and answer as turns of the tokenizer's chat")
    max_context_tokens: int = _argument(256, "drop a record whose context row is longer")
    max_query_tokens: int = _argument(128, "drop a record whose query row is longer")
    max_prompt_tokens: int = _argument(384, "drop a record whose prompt row is longer")

    remove_unused_columns: bool = _argument(False, "has to be off")

    def __post_init__(self) -> None:
        check_arguments(self)
        super().__post_init__()
        of_accelerate: Any = self.accelerator_config
        if of_accelerate.dispatch_batches is None:
            of_accelerate.dispatch_batches = False
        self.check()

    def check(self) -> None:
        """
        Raises:
            UserError: naming the argument, what was expected and what was given.
        """
        check_arguments(self)
        of_accelerate: Any = self.accelerator_config
        if of_accelerate.dispatch_batches:
            raise UserError(
                "accelerator_config: expected dispatch_batches to be off, got True: a batch is "
                "made where its step is taken"
            )
        if self.inner_params not in INNER_PARAMS:
            raise UserError(
                f'inner_params: expected "full", "linear" or "lora", got {self.inner_params!r}'
            )
        self.step_config.check()
        check_counts(self, "answer_tokens", "teacher_batch_size")
        check_counts(self, "max_context_tokens", "max_query_tokens", "max_prompt_tokens")

    @property
    def step_config(self) -> MetaStepConfig:
        """What the engine is told of a step."""
        names = [each.name for each in fields(MetaStepConfig)]
        return MetaStepConfig(**{name: getattr(self, name) for name in names})

    def limits(self, room: int) -> Limits:
        """The longest rows asked for, within the ``room`` that the model has positions for."""
        asked = (self.max_context_tokens, self.max_query_tokens, self.max_prompt_tokens)
        return Limits(*(min(limit, room) for limit in asked))
