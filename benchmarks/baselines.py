"""The ways to take a training step on one batch, all with the same model, tokens and loss.

Each way adds its gradient to ``.grad``. With θ the inner parameters, the exact ways compute the
mean over examples i of

    v_i − η H_i v_i,    v_i = ∇_θ' outer_i at θ'_i = θ − η ∇_θ L(c_i, θ),    H_i = ∇²_θ L(c_i, θ)

Each baseline is written as those who need it fast would: it makes no logits that its losses do not
need, lets go of what it can, and uses PyTorch's fused attention wherever that has the derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from gdprompt_fast import MetaBatch, TeacherTargets, fast_meta_step
from gdprompt_fast.options import select_inner
from gdprompt_fast.reference.step import twice_differentiable_attention

Parameters = dict[str, Tensor]
NO_TARGET = -100  # what cross_entropy ignores


class Example(NamedTuple):
    """One context and the query asked about it; for :func:`vmapped` with a leading dimension."""

    context_ids: Tensor  # [Tc]
    context_targets: Tensor  # [Tc], the next token or NO_TARGET
    query_ids: Tensor  # [Tq]
    response_weight: Tensor  # [J], 1 where position j predicts a response token
    teacher_hidden: Tensor  # [J, d], the teacher's final states there


class Task:
    """What a step is taken on.

    Args:
        batch: one context and one query per group, in order.
        teacher: as hidden states and head.
        inner_params: what the inner step moves, as in :func:`gdprompt_fast.fast_meta_step`.

    Attributes:
        inner: the parameters the inner step moves; frozen ones as leaves of their own.
        outer: the parameters that get a gradient.
        trained: the same without their names, for ``backward``: the frozen leaves of ``inner`` get
            none, nor is any computed.
        positions: [J], those of a query that predict a response token in some row.
        examples: all of them, [N, …].
    """

    def __init__(
        self,
        model: nn.Module,
        batch: MetaBatch,
        teacher: TeacherTargets,
        inner_lr: float = 1e-3,
        inner_params: str = "full",
    ) -> None:
        rows = torch.arange(batch.groups, device=batch.context_ids.device)
        for group in (batch.context_group, batch.query_group):
            if not torch.equal(group, rows):
                raise ValueError(f"batch: expected one context and query per group, got {group}")
        self.model, self.batch, self.teacher = model, batch, teacher
        self.inner_lr, self.inner_params = inner_lr, inner_params
        self.inner: Parameters = {
            name: p if p.requires_grad else p.detach().requires_grad_()
            for name, p in select_inner(model, inner_params).items()
        }
        self.outer: Parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.trained = list(self.outer.values())
        self.positions = batch.response_mask[:, 1:].any(0).nonzero().flatten()
        self.examples = self._examples()

    def _examples(self) -> Example:
        batch, hidden = self.batch, self.teacher.hidden
        targets = batch.context_ids.masked_fill(~batch.context_mask, NO_TARGET).roll(-1, 1)
        targets[:, -1] = NO_TARGET
        predicts = batch.response_mask[:, 1:][:, self.positions]
        teacher_hidden = hidden.new_zeros(*predicts.shape, hidden.shape[1])
        teacher_hidden[predicts] = hidden
        weight = predicts.to(hidden.dtype)
        return Example(batch.context_ids, targets, batch.query_ids, weight, teacher_hidden)

    def __iter__(self) -> Iterator[Example]:
        return (Example(*rows) for rows in zip(*self.examples, strict=True))

    def __len__(self) -> int:
        return self.batch.groups

    def logits(self, theta: Parameters, ids: Tensor, **options: Any) -> Tensor:
        """[T, V] of one row ``ids`` [T], with ``theta`` in place of the model's own parameters."""
        inputs = dict(input_ids=ids[None], use_cache=False, **options)
        return functional_call(self.model, theta, kwargs=inputs).logits[0]

    def inner_loss(self, theta: Parameters, example: Example) -> Tensor:
        """L(c, θ), the mean next-token NLL of the context."""
        logits = self.logits(theta, example.context_ids)
        return F.cross_entropy(logits, example.context_targets, ignore_index=NO_TARGET)

    def outer_loss(self, theta: Parameters, example: Example) -> Tensor:
        """Σ_j KL(teacher ‖ student) over the response tokens."""
        logits = self.logits(theta, example.query_ids, logits_to_keep=self.positions)
        target = (example.teacher_hidden @ self.teacher.head.T).log_softmax(-1)
        kl = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)
        return kl @ example.response_weight

    def adapted(self, gradient: Parameters) -> Parameters:
        """θ' = θ − η g; consumes g, so that its tensors are freed one by one."""
        return {n: w.sub(gradient.pop(n), alpha=self.inner_lr) for n, w in self.inner.items()}


Way = Callable[[Task], object]


def ordinary(task: Task) -> None:
    """The ordinary training step on every context and its query as one text: the floor.

    Holds the activations of all examples and the logits of all tokens.
    """
    ids = torch.cat([task.batch.context_ids, task.batch.query_ids], 1)
    task.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def fast(task: Task) -> None:
    """This package. Holds two sets of activations of all examples, and no copy of θ."""
    _fast(task)


def fast_recomputed(task: Task) -> None:
    """This package, making each block's activations again where a pass needs them."""
    _fast(task, recompute="block")


def fast_first_order(task: Task) -> None:
    """This package without the second-order term. Holds one set of activations."""
    _fast(task, first_order=True)


def _fast(task: Task, **options: Any) -> None:
    fast_meta_step(
        task.model,
        task.batch,
        inner_lr=task.inner_lr,
        inner_params=task.inner_params,
        teacher=task.teacher,
        **options,
    )


def sequential(task: Task) -> None:
    """MAML by autograd's double backward, one example at a time, as with higher or TorchOpt.

    Holds one adapted copy of θ, its gradient, and one example's graph through both passes.
    """
    for example in task:
        _sequential_loss(task, example).backward(inputs=task.trained)


def all_alive(task: Task) -> None:
    """The same with a single backward at the end, as the paper describes.

    Holds an adapted copy of θ and a graph per example.
    """
    losses = [_sequential_loss(task, example) for example in task]
    torch.stack(losses).sum().backward(inputs=task.trained)


def _sequential_loss(task: Task, example: Example) -> Tensor:
    # Only what is differentiated twice gives up PyTorch's fused attention.
    with twice_differentiable_attention(task.model):
        loss = task.inner_loss(task.inner, example)
        grads = torch.autograd.grad(loss, list(task.inner.values()), create_graph=True)
    gradient = dict(zip(task.inner, grads, strict=True))
    del grads
    return task.outer_loss(task.adapted(gradient), example) / len(task)


def sequential_first_order(task: Task) -> None:
    """First-order MAML: the gradient at θ' is taken for the one at θ. Another gradient.

    Holds one adapted copy of θ and its gradient.
    """
    for example in task:
        theta = task.adapted(_inner_gradient(task, example))
        (task.outer_loss(theta, example) / len(task)).backward(inputs=task.trained)


def _inner_gradient(task: Task, example: Example) -> Parameters:
    loss = task.inner_loss(task.inner, example)
    return dict(zip(task.inner, torch.autograd.grad(loss, list(task.inner.values())), strict=True))


def vmapped(task: Task) -> None:
    """All examples at once with torch.func.vmap over the inner step and the outer loss.

    Holds an adapted copy of θ, its gradient and a graph per example.
    """

    def loss(example: Example) -> Tensor:
        with twice_differentiable_attention(task.model):
            gradient = grad(task.inner_loss)(task.inner, example)
        return task.outer_loss(task.adapted(gradient), example)

    vmap(loss)(task.examples).mean().backward(inputs=task.trained)


def forward_over_reverse(task: Task) -> None:
    """H v by forward mode through the gradient's own computation, as in MixFlow-MG.

    One example at a time. Holds v, ∇L and H v, each as large as θ, and one example's activations
    with their tangents, but no graph of the backward pass.
    """
    for example in task:
        theta = task.adapted(_inner_gradient(task, example))
        direct, v = _gradients_at(task, theta, example)
        del theta
        curvature = _hessian_vector_product(task, v, example)
        del v
        for name, parameter in task.outer.items():
            gradient = curvature.pop(name).mul_(-task.inner_lr).add_(direct.pop(name))
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(gradient, alpha=1 / len(task))


def _gradients_at(task: Task, theta: Parameters, example: Example) -> tuple[Parameters, Parameters]:
    """Of the outer loss at θ' by the outer parameters, θ' held fixed where it is not one of them,
    and by θ'.
    """
    theta = {name: weight.detach().requires_grad_() for name, weight in theta.items()}
    everything = {**task.outer, **theta}
    loss = task.outer_loss(theta, example)
    grads = torch.autograd.grad(loss, list(everything.values()))
    gradients = dict(zip(everything, grads, strict=True))
    return (
        {name: gradients[name] for name in task.outer},
        {name: gradients[name] for name in theta},
    )


def _hessian_vector_product(task: Task, v: Parameters, example: Example) -> Parameters:
    """The derivative of ∇_outer L(c, θ) as θ moves along v."""
    everything = {name: p.detach() for name, p in {**task.outer, **task.inner}.items()}
    tangent = {n: v[n] if n in v else torch.zeros_like(p) for n, p in everything.items()}

    def outer_gradient(primal: Parameters) -> Parameters:
        outer = {name: primal[name] for name in task.outer}
        loss, backward = vjp(lambda chosen: task.inner_loss({**primal, **chosen}, example), outer)
        with torch.no_grad():  # no graph of the backward pass: the derivative is a forward one
            return backward(torch.ones_like(loss))[0]

    with twice_differentiable_attention(task.model), forward_differentiable_silu():
        return jvp(outer_gradient, (everything,), (tangent,))[1]


@contextmanager
def forward_differentiable_silu() -> Iterator[None]:
    """silu's backward has no forward-mode derivative in PyTorch; that of x · sigmoid(x) has."""
    fused = F.silu
    F.silu = lambda x, inplace=False: x * x.sigmoid()
    try:
        yield
    finally:
        F.silu = fused


WAYS: dict[str, Way] = {
    "ordinary": ordinary,
    "fast": fast,
    "fast recomputed": fast_recomputed,
    "fast first-order": fast_first_order,
    "sequential": sequential,
    "sequential first-order": sequential_first_order,
    "forward-over-reverse": forward_over_reverse,
    "all-alive": all_alive,
    "vmap": vmapped,
}
EXACT = ("fast", "fast recomputed", "sequential", "forward-over-reverse", "all-alive", "vmap")
FIRST_ORDER = ("fast first-order", "sequential first-order")
