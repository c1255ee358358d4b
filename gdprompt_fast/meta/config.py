"""The options and results that every implementation of a meta step shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..batch import MetaBatch, describe
from ..errors import UserError
from ..models.architecture import (
    causal_lm,
    check_id_range,
    check_model,
    check_row_lengths,
    compute_dtype,
)
from ..models.inner_params import InnerParams, layers_of, select_inner
from ..models.walk import parameters_of
from ..ops.backend import resolve_backend
from .failures import Failures
from .lm_batch import LMBatch
from .targets import TeacherTargets, check_teacher

Rate = float | Tensor | Mapping[str, Tensor]


def map_rate(rate: Rate, change: Callable[[Any], Tensor]) -> Rate:
    """η with ``change`` applied to what there is for all layers, or for each."""
    if isinstance(rate, Mapping):
        return {name: change(own) for name, own in rate.items()}
    return change(rate)


@dataclass(frozen=True)
class MetaStepConfig:
    """What a meta step computes of its data: see :func:`gdprompt_fast.fast_meta_step`.

    Attributes:
        inner_lr: η ≥ 0: a number, a tensor [] or [G], or one of these tensors for each layer that
            the inner step moves, by the layer's name.
        inner_steps: the number of inner steps.
        inner_params: what the inner step moves: ``"full"``, ``"linear"``, ``"lora"``, or a
            callable(name, parameter) -> bool.
        objective: ``"kl"`` or ``"gold"``.
        outer_reduction: over the tokens of a response, ``"sum"`` or ``"mean"``.
        lm_weight: λ ≥ 0, a number or a tensor [].
        first_order: drop the second-order term.
        backend: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.
        recompute: ``"none"`` or ``"block"``.
        verify: ``"first"`` or ``"never"``.
        micro_groups: groups at a time; None for all.
        capture: ``"auto"`` or ``"never"``.
    """

    inner_lr: Rate = 1e-3
    inner_steps: int = 1
    inner_params: InnerParams = "full"
    objective: str = "kl"
    outer_reduction: str = "sum"
    lm_weight: float | Tensor = 0.0
    first_order: bool = False
    backend: str = "auto"
    recompute: str = "none"
    verify: str = "first"
    micro_groups: int | None = None
    capture: str = "auto"

    def check(self) -> None:
        """
        Raises:
            ValueError: naming the field, what was expected and what was given.
        """
        check_inner(self.inner_lr, self.inner_steps)
        one_of("objective", self.objective, ("kl", "gold"))
        one_of("outer_reduction", self.outer_reduction, ("sum", "mean"))
        check_number("lm_weight", self.lm_weight)
        if not isinstance(self.first_order, bool):
            raise UserError(f"first_order: expected a bool, got {self.first_order!r}")
        one_of("recompute", self.recompute, ("none", "block"))
        check_verify(self.verify)
        check_count("micro_groups", self.micro_groups)
        one_of("capture", self.capture, ("auto", "never"))


# The order in which a step takes its options, those of its data among them.
OPTIONS = (
    *("inner_lr", "inner_steps", "inner_params", "objective", "teacher", "outer_reduction"),
    *("lm_weight", "lm_batch", "first_order", "backend", "recompute", "verify", "micro_groups"),
)


def named(
    order: tuple[str, ...], given: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """Options by name, of which the first may be ``given`` by position."""
    positional = dict(zip(order, given, strict=False))
    twice = sorted(positional.keys() & options.keys())
    if twice or len(given) > len(order):
        raise TypeError(f"expected every option once, got {twice or given[len(order) :]} again")
    return {**positional, **options}


@dataclass(frozen=True)
class MetaStepOutput:
    """Detached scalars of one meta step, on the model's device: reading one waits for it.

    Attributes:
        outer_loss: query_loss + λ · lm_loss, the loss whose gradient was added to ``.grad``.
        query_loss: the mean over queries of KL or NLL at θ', summed (or averaged) over response
            tokens.
        lm_loss: the mean over rows of each row's mean next-token NLL at θ, of the LM batch or the
            contexts.
        inner_loss: the mean over groups of the inner loss at θ, before the first inner step.
        backend: the implementation that ran.
        eager: why the step, or a part of it, was no replay of a captured one; empty if it was.
        failures: what was not finite.
    """

    outer_loss: Tensor
    query_loss: Tensor
    lm_loss: Tensor
    inner_loss: Tensor
    backend: str
    eager: str
    failures: Failures

    @property
    def captured(self) -> bool:
        """Whether all of the step was a replay of a captured one."""
        return not self.eager

    @property
    def found_inf(self) -> Tensor:
        """fp32 [], 1 where a loss or the teacher was not finite, as fused optimizers take it to
        skip their step.
        """
        return self.failures.found_inf

    def check(self) -> None:
        """Waits for the step.

        Raises:
            FloatingPointError: if an inner loss or the teacher's predictions were not finite; what
                the step has added to ``.grad`` is of no use then.
        """
        self.failures.check()


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = " or ".join(f'"{choice}"' for choice in choices)
        raise UserError(f"{name}: expected {expected}, got {value!r}")


def check_number(name: str, value: Any) -> None:
    """A finite number >= 0, or a tensor [] of one, whose value is taken as it is."""
    if isinstance(value, Tensor):
        if value.dim() or not value.is_floating_point():
            raise UserError(f"{name}: expected a floating tensor [], got {describe(value)}")
    elif not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UserError(f"{name}: expected a finite number >= 0, got {value!r}")


def check_count(name: str, value: Any) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(f"{name}: expected an integer >= 1 or None, got {value!r}")


def check_denominator(name: str, value: Any) -> None:
    """A count, or a tensor [] of one."""
    if not isinstance(value, Tensor):
        check_count(name, value)
    elif value.dim():
        raise UserError(f"{name}: expected a tensor [], got {describe(value)}")


def check_inner(inner_lr: Any, inner_steps: Any) -> None:
    given = inner_lr.values() if isinstance(inner_lr, Mapping) else [inner_lr]
    for rate in given:
        if isinstance(rate, Tensor):
            if rate.dim() > 1 or not rate.is_floating_point():
                raise UserError(
                    f"inner_lr: expected a floating tensor [] or [G], got {describe(rate)}"
                )
        elif isinstance(inner_lr, Mapping):
            raise UserError(f"inner_lr: expected a tensor for every layer, got {rate!r}")
        else:
            check_number("inner_lr", rate)
    if not isinstance(inner_steps, int) or isinstance(inner_steps, bool) or inner_steps < 1:
        raise UserError(f"inner_steps: expected an integer >= 1, got {inner_steps!r}")


def check_verify(verify: Any) -> None:
    one_of("verify", verify, ("first", "never"))


def check_step(
    model: nn.Module,
    batch: MetaBatch,
    config: MetaStepConfig,
    teacher: TeacherTargets | None,
    lm_batch: LMBatch | None,
    query_count: int | Tensor | None = None,
    lm_count: int | Tensor | None = None,
) -> str:
    """Checks the arguments of a meta step before anything is computed.

    Returns:
        The backend that is to run.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    check_model(model)
    if not isinstance(batch, MetaBatch):
        raise UserError(f"batch: expected a MetaBatch, got {describe(batch)}")
    embedding = causal_lm(model).get_input_embeddings().weight
    if batch.context_ids.device != embedding.device:
        raise UserError(
            f"batch: expected device {embedding.device} as the model, got "
            f"{batch.context_ids.device}"
        )
    layout, (contexts, queries) = batch.layout, batch.id_ranges
    check_id_range("context_ids", contexts, layout.shape.context_tokens, model)
    check_id_range("query_ids", queries, layout.shape.query_tokens, model)
    check_row_lengths("context_mask", batch.host.context_mask, model)
    check_row_lengths("query_mask", batch.host.query_mask, model)
    config.check()
    check_rates(config.inner_lr, layout.shape.groups)
    if isinstance(config.inner_lr, Mapping):
        layers = layers_of(model, select_inner(model, config.inner_params))
        check_layers(config.inner_lr, layers.values())
    check_teacher(config.objective, teacher, layout.tokens, len(embedding), embedding.device)
    check_denominator("query_count", query_count)
    check_denominator("lm_count", lm_count)
    if lm_batch is not None:
        check_id_range("lm_batch", lm_batch.id_range, lm_batch.ids.shape[1], model)
        check_row_lengths("lm_batch", lm_batch.host_mask, model)
    if not any(p.requires_grad for _, p in parameters_of(model)):
        raise UserError("model: expected at least one parameter with requires_grad, got none")
    return resolve_backend(
        config.backend, embedding.device, compute_dtype(model) or embedding.dtype
    )


def check_rates(inner_lr: Rate, groups: int) -> None:
    """A rate for every group."""
    for rate in inner_lr.values() if isinstance(inner_lr, Mapping) else [inner_lr]:
        if isinstance(rate, Tensor) and rate.dim() and len(rate) != groups:
            raise UserError(
                f"inner_lr: expected a tensor [] or [{groups}], a rate for every group, got "
                f"{describe(rate)}"
            )


def check_layers(inner_lr: Mapping[str, Tensor], layers: Iterable[str]) -> None:
    """A rate for every layer that the inner step moves."""
    wrong = sorted(inner_lr.keys() ^ set(layers))
    if wrong:
        given = "one for it" if wrong[0] in inner_lr else "none"
        raise UserError(
            "inner_lr: expected a rate for each layer that the inner step moves and no other, "
            f"got {given}: {wrong[0]}"
        )
