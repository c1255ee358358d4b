"""The forward: losses and logits of the engine against those of the model as it is called."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import nn

from ..meta.config import MetaStepOutput
from .engine import RowLogits, logits_at_adapted, logits_at_theta
from .objective import Objective, StepArguments
from .report import Finding


def loss_findings(out: MetaStepOutput, objective: Objective, rtol: float) -> list[Finding]:
    """The losses that the step returns: at θ, and at the θ' of every group."""
    pairs = {
        "inner loss at θ": (out.inner_loss, objective.inner_loss()),
        "outer loss at θ'": (out.query_loss, objective.query_loss()),
    }
    if objective.step.lm_weight > 0:
        pairs["next-token loss at θ"] = (out.lm_loss, objective.lm_loss())
    return [
        Finding(name, float(got), own, abs(float(got) - own), rtol * max(abs(own), 1e-3))
        for name, (got, own) in pairs.items()
    ]


def logit_findings(
    model: nn.Module, step: StepArguments, objective: Objective, rtol: float
) -> list[Finding]:
    """The logits of every row at θ, and of the queries at θ', the largest error of a position."""
    at_theta = _worst_position(logits_at_theta(model, step), objective)
    worst = []
    for group, rows in groupby(logits_at_adapted(model, step), key=lambda row: row.group):
        with objective.adapted(group):
            worst.append(_worst_position(rows, objective))
    return [
        Finding("logits at θ, every row", None, None, at_theta, rtol),
        Finding("logits at θ', every query", None, None, max(worst), rtol),
    ]


def as_called_finding(
    model: nn.Module, step: StepArguments, objective: Objective, rtol: float
) -> Finding:
    """The logits at θ in the model's own dtype, under the caller's autocast."""
    worst = _worst_position(logits_at_theta(model, step), objective)
    return Finding("logits at θ, the model as it is called", None, None, worst, rtol)


@torch.no_grad()
def _worst_position(rows: Iterable[RowLogits], objective: Objective) -> float:
    """The largest ‖engine − own‖ / ‖own‖ of a position's logits; NaN if one is."""
    worst = [0.0]
    for ids, positions, _, logits in rows:
        own = objective.logits(ids, positions).double()
        errors = (logits.double() - own).norm(dim=1) / own.norm(dim=1)
        worst.append(float(errors.max()))
    return float(torch.tensor(worst, dtype=torch.float64).max())
