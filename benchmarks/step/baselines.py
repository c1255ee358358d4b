"""The ways to take a training step on one batch, all with the same model, tokens and loss.

Each way adds its gradient to ``.grad``. The exact ways, this package's and those of
``gdprompt_fast/reference/lean_maml.py``, have the same one. Each baseline is written as those who
need it fast would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from gdprompt_fast import fast_meta_step
from gdprompt_fast.meta.config import MetaStepOutput
from gdprompt_fast.reference.lean_maml import Episode, LeanMAML, all_alive, sequential
from gdprompt_fast.reference.step import Parameters
from gdprompt_fast.update.masks import attention_by

Way = Callable[[LeanMAML], object]


def ordinary(task: LeanMAML) -> None:
    """The ordinary training step on every context and its query as one text: the floor.

    Holds the activations of all examples and the logits of all tokens.
    """
    ids = torch.cat([task.batch.context_ids, task.batch.query_ids], 1)
    task.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def fast(task: LeanMAML) -> None:
    """This package. Holds two sets of activations of all examples, and no copy of θ."""
    meta_step(task)


def fast_recomputed(task: LeanMAML) -> None:
    """This package, making each block's activations again where a pass needs them."""
    meta_step(task, recompute="block")


def fast_first_order(task: LeanMAML) -> None:
    """This package without the second-order term. Holds one set of activations."""
    meta_step(task, first_order=True)


def meta_step(task: LeanMAML, **options: Any) -> MetaStepOutput:
    """This package's step on a task, with options of :func:`gdprompt_fast.fast_meta_step`."""
    return fast_meta_step(
        task.model,
        task.batch,
        inner_lr=task.inner_lr,
        inner_steps=task.inner_steps,
        inner_params=task.inner_params,
        objective="gold" if task.teacher is None else "kl",
        teacher=task.teacher,
        **options,
    )


def sequential_first_order(task: LeanMAML) -> None:
    """First-order MAML: the gradient at θ' is taken for the one at θ. Another gradient.

    Holds one adapted copy of θ and its gradient.
    """
    for example in task:
        theta = task.adapted(_inner_gradient(task, example))
        (task.outer_loss(theta, example) / len(task)).backward(inputs=task.trained)


def _inner_gradient(task: LeanMAML, example: Episode) -> Parameters:
    _one_inner_step(task)
    loss = task.inner_loss(task.inner, example)
    return dict(zip(task.inner, torch.autograd.grad(loss, list(task.inner.values())), strict=True))


def _one_inner_step(task: LeanMAML) -> None:
    if task.inner_steps != 1:
        raise ValueError(f"inner_steps: expected 1 for this way, got {task.inner_steps}")


def vmapped(task: LeanMAML) -> None:
    """All examples at once with torch.func.vmap over the inner step and the outer loss.

    Holds an adapted copy of θ, its gradient and a graph per example.
    """
    _one_inner_step(task)

    def loss(example: Episode) -> Tensor:
        with attention_by(task.model, None):
            gradient = grad(task.inner_loss)(task.inner, example)
        return task.outer_loss(task.adapted(gradient), example)

    vmap(loss)(task.examples).mean().backward(inputs=task.trained)


def forward_over_reverse(task: LeanMAML) -> None:
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


def _gradients_at(
    task: LeanMAML, theta: Parameters, example: Episode
) -> tuple[Parameters, Parameters]:
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


def _hessian_vector_product(task: LeanMAML, v: Parameters, example: Episode) -> Parameters:
    """The derivative of ∇_outer L(c, θ) as θ moves along v."""
    everything = {name: p.detach() for name, p in {**task.outer, **task.inner}.items()}
    tangent = {n: v[n] if n in v else torch.zeros_like(p) for n, p in everything.items()}

    def outer_gradient(primal: Parameters) -> Parameters:
        outer = {name: primal[name] for name in task.outer}
        by_outer = vjp(lambda chosen: task.inner_loss({**primal, **chosen}, example), outer)
        loss, backward = by_outer[:2]
        with torch.no_grad():  # no graph of the backward pass: the derivative is a forward one
            return backward(torch.ones_like(loss))[0]

    with attention_by(task.model, None), forward_differentiable_silu():
        return jvp(outer_gradient, (everything,), (tangent,))[1]


@contextmanager
def forward_differentiable_silu() -> Iterator[None]:
    """silu's backward has no forward-mode derivative in PyTorch; that of x · sigmoid(x) has."""
    fused = F.silu

    def silu(input: Tensor, inplace: bool = False) -> Tensor:
        return input * input.sigmoid()

    F.silu = silu
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
