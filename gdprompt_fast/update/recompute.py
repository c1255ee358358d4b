"""Recomputation of transformer blocks, exact through the inner step.

A block is y = f(h, P), P being what its adapted layers read in autograd (handles of weights, each
group's own small parameters, shared ones) and the trained parameters of its other layers. Between
the passes of a meta step it keeps its input h, the cotangent of its output and the factors of its
adapted layers, which other passes need; everything else is computed again where a pass needs it:

    forward            f
    inner backward     f and its gradient, which records the factors
    double backward    f, its gradient with a graph, and the gradient of that
    last backward      f and its gradient

In the double backward the cotangents of h and P through f's own graph are complete but for those
that come from y, which the last backward adds: the gradient is linear in its cotangents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..errors import UserError
from ..ops.guard import forbid_higher_order
from ..rows import GroupedRows
from .adapted_layer import AdaptedLayer, StepState

Gradients = Sequence[Tensor | None]


class BlockUse:
    """One use of a block: f at the level, and for the rows, of that use.

    Args:
        block: the module.
        forward: f, of the hidden states alone.
        adapted_layers: those inside the block.
        parameters: the trained ones inside the block that no adapted layer reads.
        state: as it is at this use.
    """

    def __init__(
        self,
        block: nn.Module,
        forward: Callable[[Tensor], Tensor],
        adapted_layers: list[AdaptedLayer],
        parameters: list[nn.Parameter],
        state: StepState,
    ) -> None:
        self._forward, self._adapted_layers, self._parameters = forward, adapted_layers, parameters
        self._state, self._rows, self._level = state, state.rows, state.level
        self.phase = state.phase
        self.weights = partial(state.weights, block)

    def inputs(self) -> list[Tensor]:
        """P."""
        return [
            *(tensor for adapted_layer in self._adapted_layers for tensor in adapted_layer.tensors),
            *self._parameters,
        ]

    def run(self, h: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """f(h, P), P in place of what the adapted layers read."""
        state = self._state
        present = (
            state.rows,
            state.level,
            [adapted_layer.tensors for adapted_layer in self._adapted_layers],
        )
        remaining = iter(inputs)
        at_use = [
            [next(remaining) for _ in adapted_layer.tensors]
            for adapted_layer in self._adapted_layers
        ]
        self._set(self._rows, self._level, at_use)
        try:
            return self._forward(h)
        finally:
            self._set(*present)

    def gradient(self, h: Tensor, inputs: Sequence[Tensor], e: Tensor) -> Gradients:
        """Cotangents of h and P for the cotangent e of y."""
        with torch.enable_grad():
            leaves = self._leaves(h, inputs)
            y = self.run(leaves[0], leaves[1:])
        return torch.autograd.grad(y, leaves, e, allow_unused=True)

    def double_backward(
        self, h: Tensor, inputs: Sequence[Tensor], e: Tensor, cotangents: Gradients
    ) -> Gradients:
        """Cotangents of e, h and P for those of the results of :meth:`gradient`."""
        with torch.enable_grad():
            e = e.detach().requires_grad_()
            leaves = self._leaves(h, inputs)
            y = self.run(leaves[0], leaves[1:])
            with self.phase.inner(), self.phase.replay():
                first = torch.autograd.grad(y, leaves, e, create_graph=True, allow_unused=True)
        pairs = [
            (gradient, cotangent)
            for gradient, cotangent in zip(first, cotangents, strict=True)
            if gradient is not None and gradient.requires_grad and cotangent is not None
        ]
        del y, first  # their graph is freed as the backward goes
        outputs, given = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, [e, *leaves], given, allow_unused=True)

    def _leaves(self, h: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """h and P, at which the graph of a pass inside a block ends."""
        cut = len(inputs) - len(self._parameters)
        read = [tensor.detach().requires_grad_() for tensor in (h, *inputs[:cut])]
        return [*read, *self._parameters]

    def _set(self, rows: GroupedRows, level: int, tensors: list[list[Tensor]]) -> None:
        self._state.rows, self._state.level = rows, level
        for adapted_layer, at_use in zip(self._adapted_layers, tensors, strict=True):
            adapted_layer.tensors = at_use


def recomputed(
    block: nn.Module, adapted_layers: dict[nn.Module, AdaptedLayer], state: StepState
) -> Callable[..., Tensor]:
    """The forward of a transformer block that keeps its input only.

    Raises:
        UserError: inside a step, if a gradient would go another way than through that input.
    """
    own = [adapted_layers[module] for module in block.modules() if module in adapted_layers]
    read = {
        id(p) for m in block.modules() if m in adapted_layers for p in m.parameters(recurse=False)
    }
    others = [p for p in block.parameters() if p.requires_grad and id(p) not in read]
    forward = block.forward

    def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _check_constant({str(i): arg for i, arg in enumerate(args)} | kwargs)
        use = BlockUse(block, lambda h: forward(h, *args, **kwargs), own, others, state)
        return _Block.apply(hidden_states, use, *use.inputs())

    return run


def _check_constant(arguments: dict[str, Any]) -> None:
    for name, argument in arguments.items():
        tensors = argument if isinstance(argument, tuple | list) else (argument,)
        if any(isinstance(each, Tensor) and each.requires_grad for each in tensors):
            raise UserError(
                'recompute: expected "none" for a model whose blocks get a gradient through '
                f"more than their hidden states, got {name} that requires one"
            )


class _Block(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, use: BlockUse, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(h, *inputs)
        ctx.use = use
        with use.weights():
            return use.run(h, inputs)

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> Any:
        h, *inputs = ctx.saved_tensors
        if ctx.use.phase.inner_backward:
            dh, *dinputs = _BlockBackward.apply(e, h, ctx.use, *inputs)
        else:
            forbid_higher_order("a recomputed block", "once outside an inner step")
            with ctx.use.weights():
                dh, *dinputs = ctx.use.gradient(h, inputs, e)
        return dh, None, *dinputs


class _BlockBackward(Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, h: Tensor, use: BlockUse, *inputs: Tensor) -> Any:
        ctx.save_for_backward(e, h, *inputs)
        ctx.use = use
        with use.weights():
            return tuple(use.gradient(h, inputs, e))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        forbid_higher_order("a recomputed block", "twice")
        e, h, *inputs = ctx.saved_tensors
        with ctx.use.weights():
            cot_e, cot_h, *cot_inputs = ctx.use.double_backward(h, inputs, e, cotangents)
        return cot_e, cot_h, None, *cot_inputs
