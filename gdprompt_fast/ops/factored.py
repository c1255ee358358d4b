"""One pair of Functions for all that reads weights whose inner updates are kept in factors: linear
layers, embeddings, the context's loss at the head, the tied lookup (docs/autograd.md).

The pair knows what autograd must: handles, and which pass is running. What a pass computes is the
business of a :class:`FactoredWeight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.autograd import Function

from ..rows import GroupedRows
from .guard import forbid_higher_order
from .phase import Phase

Kept = Sequence[Any]  # tensors or None
Cotangents = Sequence[Tensor]


class At(NamedTuple):
    """Where weights are read: by rows of a batch, each at its group's W' of ``level``."""

    rows: GroupedRows
    level: int


class FactoredWeight(Protocol):
    """Weights W' = W − η Σ_k g_k at every level of the inner steps, the inner gradients g_k kept in
    factors; or several of them, read at one input x.

    Attributes:
        name: of the op, for its errors.
        phase: tells the inner backward from the last one.
    """

    name: str

    @property
    def phase(self) -> Phase: ...

    def apply(self, x: Tensor, at: At) -> tuple[Sequence[Tensor], Kept]:
        """Forward: the outputs, one of each weight, and what is kept for the other passes."""
        ...

    def record(
        self, kept: Kept, es: Cotangents, at: At, needs_dx: bool
    ) -> tuple[Any, Tensor | None]:
        """Inner backward: keeps g_k for the cotangents ``es`` of the outputs, and returns its
        factor, and x̄ if that is needed.
        """
        ...

    def add_use(
        self, kept: Kept, es: Cotangents, at: At, needs_dx: bool, cot_x: Tensor | None
    ) -> Tensor | None:
        """Last backward: adds to the gradients of the weights, leaves the use with the factors that
        made W', and returns x̄ if it is needed.

        Args:
            es: none at all if the outputs have no cotangents.
            cot_x: of x from :meth:`factor_cotangents` for the same kept tensors, to be added to.
        """
        ...

    def factor_cotangents(
        self, factor: Any, cot_dx: Tensor | None, at: At
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """Double backward, after all uses of the weights that the factor made: the cotangents of x,
        in whatever layout :meth:`add_use` takes, and of ``es``. Frees the factor.

        Args:
            cot_dx: the cotangent of the x̄ of :meth:`record`.
        """
        ...


def factored_use(
    weight: FactoredWeight, x: Tensor, handles: Sequence[Tensor], rows: GroupedRows, level: int
) -> tuple[Tensor, ...]:
    """The outputs of weights at x, after ``level`` inner steps.

    Their backward during an inner step records the inner gradient and is differentiable once more;
    their backward afterwards adds to the outer gradients and is not.

    Args:
        handles: of the weights at ``level``, one for each output.
    """
    *outputs, _ = FactoredUse.apply(x, weight, At(rows, level), *handles)
    return tuple(outputs)


class FactoredUse(Function):
    # The last output, the anchor, has no elements: the inner backward takes it as an input in the
    # place of x, so that its double backward runs before the last backward here, and leaves what
    # that needs: the cotangent of x, or with the head that of its dx.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: FactoredWeight, at: At, *handles: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, kept = weight.apply(x, at)
        anchor = handles[0].new_empty(0)
        ctx.save_for_backward(anchor, *handles, *kept)
        ctx.weight, ctx.at, ctx.cot_x = weight, at, list[Tensor]()
        ctx.shapes = [y.shape for y in outputs]
        ctx.set_materialize_grads(False)
        return *outputs, anchor

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        weight, at, needs_dx = ctx.weight, ctx.at, ctx.needs_input_grad[0]
        anchor, *saved = ctx.saved_tensors
        handles, kept = saved[: len(ctx.shapes)], saved[len(ctx.shapes) :]
        es = _with_zeros(cotangents[:-1], ctx.shapes)
        nothing = None, None, *(None for _ in handles)
        if not weight.phase.inner_backward:
            forbid_higher_order(weight.name, "once outside an inner step")
            cot_x = ctx.cot_x.pop() if ctx.cot_x else None
            return weight.add_use(kept, es, at, needs_dx, cot_x), *nothing
        if not es:
            return None, *nothing
        cot_x = ctx.cot_x if needs_dx else None
        dx, *dhandles = FactoredUseBackward.apply(anchor, weight, kept, at, cot_x, *es, *handles)
        return dx if needs_dx else None, None, None, *dhandles


def _with_zeros(cotangents: Sequence[Tensor | None], shapes: Sequence[Any]) -> list[Tensor]:
    """Those of all outputs if there is one of any, else none."""
    like = next((e for e in cotangents if e is not None), None)
    if like is None:
        return []
    return [
        like.new_zeros(shape) if e is None else e
        for e, shape in zip(cotangents, shapes, strict=True)
    ]


class FactoredUseBackward(Function):
    # x̄, and the inner gradients, of which only the handles are tensors.
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        weight: FactoredWeight,
        kept: Kept,
        at: At,
        cot_x: list[Tensor] | None,
        *es_and_handles: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs = len(es_and_handles) // 2
        es, handles = es_and_handles[:outputs], es_and_handles[outputs:]
        ctx.factor, dx = weight.record(kept, es, at, cot_x is not None)
        ctx.weight, ctx.at, ctx.cot_x = weight, at, cot_x
        ctx.set_materialize_grads(False)
        dx = anchor.new_empty(0) if dx is None else dx
        return dx, *(handle.new_empty(0) for handle in handles)

    @staticmethod
    def backward(ctx: Any, cot_dx: Tensor | None, *_: None) -> Any:
        forbid_higher_order(ctx.weight.name, "twice")
        factor, ctx.factor = ctx.factor, None
        cot_x, cot_es = ctx.weight.factor_cotangents(factor, cot_dx, ctx.at)
        if ctx.cot_x is not None and cot_x is not None:
            ctx.cot_x.append(cot_x)
        return None, None, None, None, None, *cot_es, *(None for _ in cot_es)
