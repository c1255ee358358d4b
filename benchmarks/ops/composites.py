"""What is matrix products with kernels between them: the inner-updated linear layer, and the losses
at the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdprompt_fast.ops.gradient import WeightGradient
from gdprompt_fast.ops.linear import Factor, InnerLinear, Use
from gdprompt_fast.ops.phase import Phase
from gdprompt_fast.ops.rate import Rate
from gdprompt_fast.ops.vocabulary import KLTarget, Vocabulary
from gdprompt_fast.ops.vocabulary.passes import (
    adjoint_pass,
    context_pass,
    response_pass,
    state_gradient,
)
from gdprompt_fast.ops.vocabulary.state import Lookup
from gdprompt_fast.rows import GroupedRows
from gdprompt_fast.testing.op_inputs import LINEAR, Draw, Shape, sizes


def rate_of(draw: Draw, groups: int, inner_lr: float) -> Rate:
    """The same η for every group."""
    return Rate(torch.full_like(draw(groups), inner_lr, dtype=torch.float32))


def inner_linear_calls(draw: Draw, shape: Shape) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """A use of θ' with its match x Xᵀ, and the cotangents of X and E from a use."""
    groups, rows, inputs, outputs, context = sizes(shape, LINEAR)
    bias = draw(outputs) if shape.get("bias") else None
    layer = InnerLinear(
        draw(outputs, inputs),
        bias,
        inner_weight=True,
        inner_bias=bias is not None,
        rate=rate_of(draw, groups, 0.3),
        phase=Phase(second_order=True),
        weight_gradient=None,
        bias_gradient=None,
    )
    factor = Factor(draw(groups, context, inputs), draw(groups, context, outputs))
    layer.factors.append(factor)
    x, u, f = draw(groups, rows, inputs), draw(groups, rows, inputs), draw(groups, rows, outputs)
    grouped = GroupedRows(torch.arange(groups, device=x.device), groups)

    def product() -> tuple[Tensor, ...]:
        return (layer.product(x, grouped, 1),)

    def pull() -> tuple[Tensor, ...]:
        factor.uses.append(Use(u, f, True, None, None))
        x_cot, e_cot = layer.factor_cotangents(factor)
        assert x_cot is not None and e_cot is not None
        return x_cot, e_cot

    return {"inner_linear_product": product, "inner_linear_pull": pull}


def inner_linear_flops(pass_: str, shape: Shape) -> float:
    """As timed, through the tokens: x W, x Xᵀ and its product with E; twice two products."""
    groups, rows, inputs, outputs, context = sizes(shape, LINEAR)
    update = context * (inputs + outputs)
    per_row = {
        "inner_linear_product": inputs * outputs + update,
        "inner_linear_pull": 2 * update,
    }[pass_]
    return 2.0 * groups * rows * per_row


def loss_calls(draw: Draw, shape: Shape) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """At a tied head after an inner step: forward and inner backward of the contexts' loss, forward
    and backward of the responses' KL to a teacher, and the double backward of the former with the
    head's gradient of both.
    """
    groups, rows, responses, hidden = (shape[n] for n in ("groups", "rows", "responses", "hidden"))
    weight = draw(shape["vocabulary"], hidden) * hidden**-0.5
    weight.grad = torch.zeros_like(weight)
    phase, gradient = Phase(second_order=True), WeightGradient(weight)
    vocabulary = Vocabulary(weight, None, True, rate_of(draw, groups, 0.1), phase, gradient)
    group = torch.arange(groups, device=weight.device)
    ids = torch.arange(groups * rows, device=weight.device) ** 2 % len(weight)
    vocabulary.begin_contexts(ids.view(groups, rows), GroupedRows(group, groups))
    h_GSD, e_GSD, direction_GSD = (draw(groups, rows, hidden) for _ in range(3))
    h_GMD, teacher_GMD, u_GMD = (draw(groups, responses, hidden) for _ in range(3))
    wide = torch.promote_types(weight.dtype, torch.float32)
    position_weight = torch.full((groups, rows), 1 / rows, device=weight.device, dtype=wide)

    def context_loss() -> tuple[Tensor, ...]:
        vocabulary.steps.clear()
        nll_GS = context_pass(vocabulary, h_GSD, 0)
        (step,) = vocabulary.steps
        step.weight_GS, step.lookup_GSD, step.direction_GSD = position_weight, e_GSD, direction_GSD
        return nll_GS, state_gradient(vocabulary, step, 0)

    def response_loss() -> tuple[Tensor, ...]:
        target = KLTarget(None, teacher_GMD, weight)
        response = response_pass(vocabulary, h_GMD, target, 1)
        vocabulary.response, vocabulary.uses = response.f.tile, [response.use]
        return response.loss_GM, response.dh_GMD

    def double_backward() -> tuple[Tensor, ...]:
        return adjoint_pass(vocabulary, 0), weight.grad

    context_loss()
    response_loss()
    vocabulary.lookups.append(Lookup(ids.view(groups, rows)[:, :responses], u_GMD))
    return {
        "context_loss": context_loss,
        "response_loss": response_loss,
        "double_backward": double_backward,
    }


def loss_flops(pass_: str, shape: Shape) -> float:
    """Of the products with the head, and with the inner update of the responses' logits."""
    groups, rows, responses = shape["groups"], shape["rows"], shape["responses"]
    per_context, per_response, per_pair = {
        "context_loss": (2, 0, 0),  # logits, mean row
        "response_loss": (1, 4, 3),  # of student and teacher
        "double_backward": (5, 3, 2),  # logits twice, their cotangent's product, gradients
    }[pass_]
    tokens = groups * (rows * per_context + responses * per_response) * shape["hidden"]
    return 2.0 * shape["vocabulary"] * (tokens + groups * rows * responses * per_pair)


@dataclass(frozen=True)
class Composite:
    """An op of matrix products and kernels: its calls, their FLOPs, the op its kernels are of."""

    calls: Callable[[Draw, Shape], dict[str, Callable[[], tuple[Tensor, ...]]]]
    names: tuple[str, ...]
    flops: Callable[[str, Shape], float]
    kernels: str


COMPOSITES = {
    "inner_linear": Composite(
        inner_linear_calls,
        ("inner_linear_product", "inner_linear_pull"),
        inner_linear_flops,
        "linear",
    ),
    "losses": Composite(
        loss_calls,
        ("context_loss", "response_loss", "double_backward"),
        loss_flops,
        "vocabulary",
    ),
}
