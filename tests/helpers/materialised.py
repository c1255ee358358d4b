"""Small functions with an inner step inside, by the ops and with materialised weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gdprompt_fast.ops.gradient import WeightGradient
from gdprompt_fast.ops.handle import depend_on, weight_handle
from gdprompt_fast.ops.phase import Phase
from gdprompt_fast.ops.rate import Rate
from gdprompt_fast.ops.vocabulary import (
    KLTarget,
    NLLTarget,
    Target,
    Vocabulary,
    context_loss,
    response_loss,
    tied_lookup,
)
from gdprompt_fast.rows import GroupedRows


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def rate(groups: int) -> Rate:
    """η = 0.3 in every group."""
    return Rate(torch.full((groups,), 0.3, dtype=torch.float64))


def assert_same_value_and_gradients(
    op: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> None:
    """The gradient of what follows an inner step goes through the double backward of the op."""
    out, expected = op(*inputs), plain(*inputs)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, direction)
    for g, e in zip(got, torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


def materialised_linear(
    x_context: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_query: Tensor,
    groups: list[Tensor],
    steps: int,
) -> Tensor:
    out = torch.zeros(*x_query.shape[:-1], len(weight), dtype=x_query.dtype)
    for g in range(3):
        own = [weight] if bias is None else [weight, bias]
        for _ in range(steps):
            loss = F.linear(x_context[groups[0] == g], *own).sin().sum()
            grads = torch.autograd.grad(loss, own, create_graph=True)
            own = [w - 0.3 * dw for w, dw in zip(own, grads, strict=True)]
        out = out.index_put(
            ((groups[1] == g).nonzero()[:, 0],), F.linear(x_query[groups[1] == g], *own)
        )
    return out


def _untied_states(tokens: Tensor, table: Tensor, mix: Tensor) -> Tensor:
    """Of ids alone: no embedding is in it."""
    return torch.tanh(F.one_hot(tokens, len(table)).to(mix) @ torch.ones_like(table) + mix[0])


def vocabulary_twice(
    table: Tensor,
    mix: Tensor,
    ids: list[Tensor],
    groups: list[Tensor],
    tied: bool,
    teacher_RV: Tensor | None = None,
) -> Tensor:
    """A model of one tanh layer: an inner step on the head (and the tied table), then its NLL or
    the KL to a teacher.
    """
    contexts, queries = (GroupedRows(group, 2) for group in groups)
    phase, gradient = Phase(second_order=True), WeightGradient(table)
    vocabulary = Vocabulary(
        table.detach(), padding_idx=None, inner=True, rate=rate(2), phase=phase, gradient=gradient
    )
    handle = weight_handle((table, gradient))
    vocabulary.begin_contexts(ids[0], contexts)

    def states(tokens: Tensor, handle: Tensor, rows: GroupedRows, level: int) -> Tensor:
        if tied:
            return torch.tanh(tied_lookup(tokens, handle, vocabulary, rows, level) @ mix)
        return _untied_states(tokens, table, mix)

    weight = torch.full_like(ids[0], 1, dtype=table.dtype) / (ids[0].shape[1] - 1)
    weight[:, -1] = 0  # the last position predicts nothing
    loss = context_loss(states(ids[0], handle, contexts, 0), weight, handle, vocabulary, 0)
    with phase.inner():
        (step,) = torch.autograd.grad(loss.sum(), handle, create_graph=True)
    handle = depend_on(handle, step)
    h_RD = states(ids[1], handle, queries, 1)[:, -1]
    target: Target = NLLTarget(queries.to_groups(ids[1][:, 0]))
    if teacher_RV is not None:
        target = KLTarget(queries.to_groups(teacher_RV), None, None)
    return response_loss(h_RD, target, handle, vocabulary, queries, 1)


def vocabulary_materialised(
    table: Tensor,
    mix: Tensor,
    ids: list[Tensor],
    groups: list[Tensor],
    tied: bool,
    teacher_RV: Tensor | None = None,
) -> Tensor:
    def states(tokens: Tensor, table: Tensor) -> Tensor:
        if tied:
            return torch.tanh(table[tokens] @ mix)
        return _untied_states(tokens, table, mix)

    losses = []
    for row, g in enumerate(groups[1]):
        own = ids[0][groups[0] == g]
        logits = states(own, table) @ table.T
        nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), own[:, 1:], reduction="none")
        (step,) = torch.autograd.grad(nll.mean(1).sum(), table, create_graph=True)
        adapted = table - 0.3 * step
        h = states(ids[1][row : row + 1], adapted)[:, -1]
        gold = F.one_hot(ids[1][row, :1], len(table)).to(table)
        p = gold if teacher_RV is None else teacher_RV[row : row + 1].softmax(1)
        kl = F.kl_div((h @ adapted.T).log_softmax(1), p, reduction="none")
        losses.append(kl.sum(1))
    return torch.cat(losses)
