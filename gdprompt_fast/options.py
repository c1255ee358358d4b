"""The options and results that every implementation of a meta step shares."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import causal_lm, check_ids, check_model, check_row_lengths, compute_dtype
from .backend import resolve_backend
from .batch import MetaBatch, check_tokens, describe
from .errors import UserError
from .targets import TeacherTargets, check_teacher

InnerParams = str | Callable[[str, nn.Parameter], bool]
LMBatch = tuple[Tensor, Tensor]


def option(default: Any, what: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field that is also a command-line option, with its help text."""
    return field(default=default, metadata={"help": what, "choices": choices})


def check_integers(options: Any) -> None:
    """That every field of a dataclass that is an integer has one.

    Raises:
        ValueError: naming the option.
    """
    for each in fields(options):
        value = getattr(options, each.name)
        if each.type == "int" and not isinstance(value, int):
            raise UserError(f"{each.name}: expected an integer, got {value!r}")


def warmup_then_cosine(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Adam's rate at ``step``, counted from 0: a linear warm-up, then a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class MetaStepOutput:
    """Detached scalars of one meta step.

    Attributes:
        outer_loss: query_loss + λ · lm_loss, the loss whose gradient was added to ``.grad``.
        query_loss: the mean over queries of KL or NLL at θ', summed (or averaged) over response
            tokens.
        lm_loss: the mean over rows of each row's mean next-token NLL at θ, of the LM batch or the
            contexts.
        inner_loss: the mean over groups of the inner loss at θ, before the first inner step.
        backend: the implementation that ran.
    """

    outer_loss: Tensor
    query_loss: Tensor
    lm_loss: Tensor
    inner_loss: Tensor
    backend: str


def select_inner(model: nn.Module, inner_params: InnerParams) -> dict[str, nn.Parameter]:
    """The parameters the inner step moves, by name: ``"full"`` the base parameters (frozen ones
    too), ``"lora"`` the active PEFT adapters, or those for which ``inner_params(name,
    parameter)`` is true.

    Raises:
        ValueError: if the choice is unknown or selects nothing.
    """
    if callable(inner_params):
        chosen = inner_params
    elif inner_params in ("full", "lora"):

        def chosen(name: str, _: nn.Parameter) -> bool:
            if ".lora_" in name:
                return inner_params == "lora" and _is_active(name, model)
            frozen_copy = ".original_module." in name  # of PEFT's modules_to_save; never used
            return inner_params == "full" and not frozen_copy

    else:
        raise UserError(
            'inner_params: expected "full", "lora" or a callable(name, parameter) -> bool, '
            f"got {inner_params!r}"
        )
    selected = {name: p for name, p in model.named_parameters() if chosen(name, p)}
    if not selected:
        raise UserError(
            f"inner_params: expected to select some parameters, got none with {inner_params!r}"
        )
    return selected


def _is_active(name: str, model: nn.Module) -> bool:
    """Whether a parameter ``layer.lora_A.adapter.weight`` is of an adapter that the layer uses."""
    path, _, rest = name.rpartition(".lora_")
    layer: Any = model.get_submodule(path)
    return rest.split(".")[1] in layer.active_adapters


def check_inner(inner_lr: Any, inner_steps: Any) -> None:
    if not isinstance(inner_lr, int | float) or not math.isfinite(inner_lr) or inner_lr < 0:
        raise UserError(f"inner_lr: expected a finite number >= 0, got {inner_lr!r}")
    if not isinstance(inner_steps, int) or isinstance(inner_steps, bool) or inner_steps < 1:
        raise UserError(f"inner_steps: expected an integer >= 1, got {inner_steps!r}")


def check_verify(verify: Any) -> None:
    if verify not in ("first", "never"):
        raise UserError(f'verify: expected "first" or "never", got {verify!r}')


def check_step(
    model: nn.Module,
    batch: MetaBatch,
    inner_lr: float,
    inner_steps: int,
    objective: str,
    teacher: TeacherTargets | None,
    outer_reduction: str,
    lm_weight: float,
    lm_batch: LMBatch | None,
    first_order: bool,
    backend: str,
    recompute: str,
    verify: str = "first",
    micro_groups: int | None = None,
    query_count: int | None = None,
    lm_count: int | None = None,
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
    check_ids("context_ids", batch.context_ids, model)
    check_ids("query_ids", batch.query_ids, model)
    check_row_lengths("context_mask", batch.context_mask, model)
    check_row_lengths("query_mask", batch.query_mask, model)
    check_inner(inner_lr, inner_steps)
    check_teacher(
        objective, teacher, int(batch.response_mask.sum()), len(embedding), embedding.device
    )
    if outer_reduction not in ("sum", "mean"):
        raise UserError(f'outer_reduction: expected "sum" or "mean", got {outer_reduction!r}')
    if not isinstance(lm_weight, int | float) or not math.isfinite(lm_weight) or lm_weight < 0:
        raise UserError(f"lm_weight: expected a finite number >= 0, got {lm_weight!r}")
    if not isinstance(first_order, bool):
        raise UserError(f"first_order: expected a bool, got {first_order!r}")
    if recompute not in ("none", "block"):
        raise UserError(f'recompute: expected "none" or "block", got {recompute!r}')
    check_verify(verify)
    for name, count in (
        ("micro_groups", micro_groups),
        ("query_count", query_count),
        ("lm_count", lm_count),
    ):
        if count is not None and (type(count) is not int or count < 1):
            raise UserError(f"{name}: expected an integer >= 1 or None, got {count!r}")
    if lm_batch is not None:
        check_lm_batch(lm_batch, model)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("model: expected at least one parameter with requires_grad, got none")
    return resolve_backend(backend, embedding.device, compute_dtype(model) or embedding.dtype)


def check_lm_batch(lm_batch: Any, model: nn.Module) -> None:
    if not isinstance(lm_batch, tuple) or len(lm_batch) != 2:
        raise UserError(f"lm_batch: expected a pair (ids, mask), got {describe(lm_batch)}")
    ids, mask = lm_batch
    check_tokens("lm_batch", ids, mask, "[N, T]")
    check_ids("lm_batch", ids, model)
    check_row_lengths("lm_batch", mask, model)
    if (mask.sum(1) < 2).any():
        raise UserError("lm_batch: expected at least 2 real tokens in every row")


@contextmanager
def clean_after_error(model: nn.Module) -> Iterator[None]:
    """A failed step leaves no ``.grad`` where there was none."""
    without_grad = [p for p in model.parameters() if p.grad is None]
    try:
        with nothing_changed_in_place():
            yield
    except BaseException:
        for parameter in without_grad:
            parameter.grad = None
        raise


@contextmanager
def nothing_changed_in_place() -> Iterator[None]:
    """A hook may change in place what the model keeps no copy of, but the engine does.

    Raises:
        UserError: where autograd found a tensor of a step changed.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"in-?place operation", str(error)):
            raise
        raise UserError(
            "model: expected modules and hooks that leave their inputs as they are, got one that "
            f"changes what a step still needs: {error}"
        ) from error


def check_inner_loss(loss_G: Tensor, step: int, first_group: int = 0) -> None:
    """A NaN or infinite inner loss would poison every meta-gradient; stop while ``.grad`` is
    untouched.
    """
    bad = ~torch.isfinite(loss_G)
    if bad.any():
        group = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"inner loss: expected a finite number, got {float(loss_G[group])} "
            f"for group {first_group + group} at inner step {step + 1}"
        )


def context_weights(batch_group: Tensor, groups: int, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the inner loss: of each context in its group's mean [C], and of each position t in
    its context's mean over the tokens t+1 it predicts [C, Tc] (the last position predicts none).
    """
    per_group = torch.bincount(batch_group, minlength=groups)
    predicts = torch.zeros_like(loss_mask, dtype=torch.float64)
    predicts[:, :-1] = loss_mask[:, 1:].double()
    return 1.0 / per_group[batch_group].double(), predicts / predicts.sum(1, keepdim=True)
