"""What a memory plan is for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config.fields import Config, check_counts, option
from ..errors import UserError
from ..meta.config import MetaStepConfig
from ..models.inner_params import INNER_PARAMS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PlannedStep(Config):
    """The sizes and choices that decide the memory of a step; every field is an option of the
    command line.

    Raises:
        UserError: naming the option, what was expected and what was given.
    """

    batch: int = option(16, "examples in a step, each with a θ' of its own")
    micro_batch: int = option(0, "of those, so many at a time; 0: all at once")
    context: int = option(256, "tokens of a context")
    query: int = option(32, "tokens of a query and its response")
    response: int = option(8, "tokens of the response among them")
    inner: str = option("full", "what the inner step moves", INNER_PARAMS)
    outer: str = option("full", "what is trained: all weights or LoRA adapters", ("full", "lora"))
    lora_rank: int = option(16, "rank of the adapters, on every linear layer but the head")
    inner_steps: int = option(1, "inner gradient steps on a context")
    objective: str = option("kl", "against a teacher (kl) or the response (gold)", ("kl", "gold"))
    recompute: str = option("none", "what is computed again, not kept", ("none", "block"))
    optimizer: str = option("adam", "that holds states of all it trains", ("adam", "sgd", "none"))
    dtype: str = option("bf16", "to compute in; what is trained stays fp32", tuple(DTYPES))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "batch", "response", "lora_rank", "inner_steps")
        check_counts(self, "context", "query", least=2)
        check_counts(self, "micro_batch", least=0)
        if self.response >= self.query:
            raise UserError(
                f"response: expected fewer tokens than the query's {self.query}, which include "
                f"it, got {self.response}"
            )
        if self.inner == "lora" and self.outer != "lora":
            raise UserError(
                'inner: expected "full" or "linear" without adapters (outer "full"), got "lora"'
            )

    @property
    def step_config(self) -> MetaStepConfig:
        """What the engine is told of the step."""
        return MetaStepConfig(
            inner_steps=self.inner_steps,
            inner_params=self.inner,
            objective=self.objective,
            backend="torch",
            recompute=self.recompute,
            verify="never",
            micro_groups=self.micro_batch or None,
        )
