"""``check_exactness``: the engine against the model's own forward, on the user's own model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..batch import MetaBatch, describe
from ..errors import UserError
from ..meta.config import MetaStepOutput, check_step, named
from ..meta.gathered import check_whole
from ..meta.lm_batch import LMBatch
from ..meta.targets import TeacherTargets
from ..models.architecture import compute_dtype
from .engine import meta_gradient
from .forward import as_called_finding, logit_findings, loss_findings
from .gradient import (
    Directions,
    EngineGradients,
    Power,
    first_order_finding,
    own_terms,
    power_of,
    rounding_of,
)
from .memory import obstacle_to
from .objective import Objective, StepArguments
from .padding import without_padding_token
from .precision import bf16_precision
from .report import CANNOT_TELL, EXACT, NOT_EXACT, ExactnessReport, Finding
from .weights import copied, left_as_it_was

OPTIONS = (
    *("inner_lr", "inner_steps", "inner_params", "objective", "teacher", "outer_reduction"),
    *("lm_weight", "lm_batch", "backend", "recompute"),
)
POWER = 10.0  # the second-order term must be so many times the difference allowed
LOOK = (
    "Do not train with this: look for what the engine does not see, a hook on or a wrapper around "
    "the causal LM, or changed code in one of its layers."
)
UNCERTAIN = 0.05  # of the slope along the meta-gradient: with more allowed, nothing is shown


def check_exactness(
    model: nn.Module, batch: MetaBatch, *given: Any, **options: Any
) -> ExactnessReport:
    """Whether :func:`gdprompt_fast.fast_meta_step` gives this very model's exact meta-gradient.

    The truth is the model itself, called as ``model(input_ids=row)``, each row alone, with its
    hooks, wrappers and fused attention; θ' = θ − η ∇L is written into its weights, and nothing is
    differentiated twice. Compared are

    - losses and logits at θ, and at θ' of every group;
    - the first-order meta-gradient of every parameter, with the model's own backward;
    - ⟨meta-gradient, v⟩ with central differences of the true objective
      φ(θ) = outer(θ − η ∇L(θ)) + λ L_LM(θ), for v the meta-gradient, its second-order term (the
      engine's, and by differences of ∇L, across the first-order gradient) and random directions;
    - the meta-gradient in bf16, and its second-order term alone, with the exact one.

    Weights are exchanged for fp64 copies where memory and backend allow (Triton has no fp64),
    otherwise for fp32 ones; the rounding of φ is measured and its effect is part of what counts as
    equal. The smallest fault found on tiny models, from η = 0.1 to 0.001: in the second-order
    term 3e-5 to 1e-3 of it in fp64, 0.1 to 1 % in fp32; noise on the whole gradient, 3e-5 to 3e-4
    and 3e-4 to 5e-3 of its norm. The cost is about that of 100 meta steps on the batch: give it an
    example or a few. The model is left as it was, to the bit, also after an exception.

    Args:
        model, batch: as in :func:`gdprompt_fast.fast_meta_step`.
        given, options: as there too, by position or name, with numbers for rates; but ``verify``,
            ``first_order``, ``micro_groups`` and the counts.

    Raises:
        ValueError: what ``fast_meta_step`` raises for these arguments; a model whose weights are
            sharded.
        FloatingPointError: if a loss is not finite.
    """
    check_whole(model, "check_exactness")
    options = named(OPTIONS, given, options)
    teacher: TeacherTargets | None = options.pop("teacher", None)
    lm_batch = options.pop("lm_batch", None)
    rows = None if lm_batch is None else LMBatch.of(lm_batch)
    step = StepArguments(batch=batch, teacher=teacher, lm_batch=rows, **options)
    ran = check_step(model, batch, step.config, teacher, rows)
    for name in ("inner_lr", "lm_weight"):
        if not isinstance(value := getattr(step, name), int | float):
            raise UserError(f"{name}: expected a number, got {describe(value)}")
    with left_as_it_was(model):
        as_called = _as_called(model, replace(step, backend=ran))
        notes: list[str] = []
        for dtype in (torch.float64, torch.float32):
            obstacle = obstacle_to(dtype, model, ran, step.inner_params)
            try:
                if obstacle is None:
                    return _report(model, step, ran, dtype, as_called, notes)
            except (RuntimeError, MemoryError) as error:
                if dtype == torch.float32:
                    raise
                obstacle = str(error).strip().partition("\n")[0]
            name = str(dtype).removeprefix("torch.")
            notes.append(f"The gradients could not be compared in {name}: {obstacle}.")
    return _without_gradients(step, ran, as_called, notes)


def _as_called(model: nn.Module, step: StepArguments) -> Finding:
    dtypes = {compute_dtype(model), *(p.dtype for p in model.parameters())} - {None}
    rtol = max(rounding_of(dtype) for dtype in dtypes if dtype is not None)
    return as_called_finding(model, step, Objective(model, step), rtol)


@dataclass(frozen=True)
class _Compared:
    """What the verdict rests on: all findings, the one along the meta-gradient, and the power."""

    findings: list[Finding]
    main: Finding | None
    power: Power
    gradients: EngineGradients


def _without_gradients(
    step: StepArguments, backend: str, as_called: Finding, notes: list[str]
) -> ExactnessReport:
    """What can be said where there is no memory for more than the step itself."""
    differs = not as_called.agrees
    return ExactnessReport(
        NOT_EXACT if differs else CANNOT_TELL,
        ((_difference(as_called),) if differs else ()) + tuple(notes),
        (LOOK,) if differs else ("Check a smaller model of the same code, or with more memory.",),
        (as_called,),
        None,
        0.0,
        "none",
        backend,
        float(step.inner_lr),
    )


def _report(
    model: nn.Module,
    step: StepArguments,
    backend: str,
    dtype: torch.dtype,
    as_called: Finding,
    notes: list[str],
) -> ExactnessReport:
    device = step.batch.context_ids.device.type
    comparable, note = without_padding_token(model, step)
    with copied(model, dtype), torch.autocast(device, enabled=False):
        compared = _compare(model, replace(comparable.in_dtype(dtype), backend=backend), dtype)
    precision = bf16_precision(model, comparable, compared.gradients)
    findings = (as_called, *compared.findings)
    verdict, reasons, suggestions, suggested = _judge(findings, compared, float(step.inner_lr))
    return ExactnessReport(
        verdict,
        (*reasons, *note, *notes),
        suggestions,
        findings,
        precision,
        compared.power.times_allowed,
        str(dtype).removeprefix("torch."),
        backend,
        float(step.inner_lr),
        suggested,
    )


def _compare(model: nn.Module, step: StepArguments, dtype: torch.dtype) -> _Compared:
    rtol, objective = rounding_of(dtype), Objective(model, step)
    out, engine = _engine(model, step)
    findings = loss_findings(out, objective, rtol)
    findings += logit_findings(model, step, objective, rtol)
    own = own_terms(model, objective)
    findings.append(first_order_finding(engine.first_order, own.first_order, rtol))
    along = list(Directions(model, objective, engine, rtol).all(own))
    findings += [finding for finding, _ in along]
    return _Compared(
        findings, along[0][0] if along else None, power_of(along, engine, own, POWER), engine
    )


def _engine(model: nn.Module, step: StepArguments) -> tuple[MetaStepOutput, EngineGradients]:
    out, whole = meta_gradient(model, step)
    _, first_order = meta_gradient(model, step, first_order=True)
    return out, EngineGradients(whole, first_order)


def _judge(
    findings: tuple[Finding, ...], compared: _Compared, inner_lr: float
) -> tuple[str, tuple[str, ...], tuple[str, ...], float | None]:
    """Verdict, reasons, suggestions and, where η is too small to tell, a better one."""
    differing = [finding for finding in findings if not finding.agrees]
    main, power = compared.main, compared.power
    if differing:
        return NOT_EXACT, tuple(_difference(finding) for finding in differing), (LOOK,), None
    if main is None or main.allowed > UNCERTAIN * abs(main.engine or 0.0):
        reason = "Along the meta-gradient itself the objective is too noisy to differentiate."
        return CANNOT_TELL, (reason,), ("Check on other examples, or in float32 weights.",), None
    if power.times_allowed < POWER:
        reason = (
            f"At η = {inner_lr:g} the second-order term is {power.times_allowed:.2g} times what "
            "rounding hides: a gradient without it would pass."
        )
        suggestions: tuple[str, ...] = ()
        if power.inner_lr is not None:
            suggestions = (f"Check with --inner-lr {power.inner_lr:g}: the term grows with η.",)
        return CANNOT_TELL, (reason,), suggestions, power.inner_lr
    reason = (
        f"All {len(findings)} comparisons are equal; without the second-order term one would be "
        f"off by {power.times_allowed:.2g} times what is allowed."
    )
    return EXACT, (reason,), (), None


def _difference(finding: Finding) -> str:
    return (
        f"{finding.name}: the two differ by {finding.difference:.2g}, "
        f"allowed is {finding.allowed:.2g}."
    )
