"""A model inside the context of its inner step: at the θ' of one or several contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Example, context_loss_mask, pad
from ..errors import UserError
from ..meta.config import check_inner
from ..meta.gathered import check_whole, opened
from ..meta.inner import inner_step
from ..models.inner_params import select_inner


@dataclass(frozen=True)
class InnerStep:
    """How the context goes into the weights: the options of :func:`gdprompt_fast.inner_step`."""

    lr: float
    steps: int = 1
    params: str = "full"


def check_inner_step(model: nn.Module, inner: InnerStep, one_after_another: bool) -> None:
    """What the inner step needs, before any long work.

    Raises:
        ValueError: naming the argument; also for contexts one after another in weights other than
            float32, whose rounding would lose much of a step.
    """
    check_inner(inner.lr, inner.steps)
    if one_after_another:
        check_whole(model, "contexts one after another")
    with opened(model):
        selected = select_inner(model, inner.params)
    for name, parameter in selected.items():
        if one_after_another and parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                "one_after_another: expected float32 weights, into which steps are rounded, "
                f"got {parameter.dtype} in {name}"
            )


@contextmanager
def adapted_to_contexts(
    model: nn.Module, examples: Sequence[Example], inner: InnerStep, contexts_per_group: int = 1
) -> Iterator[None]:
    """Inside, row b of the model's input runs at the θ' of example b's group.

    Every ``contexts_per_group`` examples in a row are a group: its inner loss is the mean of those
    of its contexts. All groups are adapted at once and the weights are not touched.
    """
    device = next(model.parameters()).device
    ids, mask = pad([example.context for example in examples])
    groups = (torch.arange(len(examples)) // contexts_per_group).to(device)
    update = inner_step(
        model,
        ids.to(device),
        mask.to(device),
        groups,
        inner_lr=inner.lr,
        inner_steps=inner.steps,
        inner_params=inner.params,
        context_loss_mask=context_loss_mask(examples, mask).to(device),
    )
    with update.applied_to(model, groups=groups):
        yield


@contextmanager
def adapted_one_after_another(
    model: nn.Module, examples: Sequence[Example], inner: InnerStep
) -> Iterator[None]:
    """Inside, the model is at the θ' of one group: its contexts were stepped on in their order,
    each ``inner.steps`` times, each step from the weights that the one before it reached.

    The steps are taken in the model's own weights, which get their old bits back afterwards, also
    after an error. That takes a copy of what is moved and, during a step, its gradient.

    Weights that diverge on the way end as NaN, and so all that is asked of them is answered wrong:
    what becomes of a model after many steps is what is measured.
    """
    moved = list(select_inner(model, inner.params).values())
    before = [parameter.detach().clone() for parameter in moved]
    trained = [parameter.requires_grad for parameter in moved]
    try:
        for parameter in moved:
            parameter.requires_grad_()
        for example in examples:
            ids, mask = (rows.to(moved[0].device) for rows in pad([example.context]))
            counts = context_loss_mask([example], mask)
            for _ in range(inner.steps):
                _step_in_place(model, moved, ids, counts, inner.lr)
        yield
    finally:
        with torch.no_grad():
            for parameter, old, requires_grad in zip(moved, before, trained, strict=True):
                parameter.copy_(old).requires_grad_(requires_grad)


def _step_in_place(
    model: nn.Module, moved: Sequence[nn.Parameter], ids: Tensor, counts: Tensor, lr: float
) -> None:
    """θ ← θ − η ∇L for the context ``ids`` [1, T], L the mean of its next-token NLL, of the tokens
    of ``counts`` [1, T].
    """
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        counted = counts[0, 1:]
        loss = F.cross_entropy(logits[counted].float(), ids[0, 1:][counted])
        gradients = torch.autograd.grad(loss, moved)
    with torch.no_grad():
        for parameter, gradient in zip(moved, gradients, strict=True):
            parameter.sub_(gradient, alpha=lr)
