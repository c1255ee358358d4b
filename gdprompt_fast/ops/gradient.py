"""Where the products of the last backward become the gradient of a shared weight."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from ..distributed.sharded import StandIn


class Present(Protocol):
    """What a pass that reads a weight, or adds to its gradient, runs in: the weight may have to be
    gathered for it, and the gradient to be summed over processes after it.
    """

    def __call__(self, read: bool = True) -> AbstractContextManager[None]: ...


def always_present(read: bool = True) -> AbstractContextManager[None]:
    """Of a weight that need not be gathered."""
    return nullcontext()


class WeightGradient:
    """Sums Fᵀ U over all uses of one weight [O, I] without a temporary of its size per use.

    The sum goes straight into the weight's ``.grad`` where there is one, and into one buffer, which
    autograd then adopts as ``.grad``, where there is none.
    """

    def __init__(self, parameter: Tensor, transposed: bool = False) -> None:
        self._parameter, self._dtype = parameter, parameter.dtype
        if isinstance(parameter, StandIn):
            parameter.gradient, self._dtype = self, parameter.gradient_dtype
        self._transposed = transposed
        self._sum: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add_product(self, f_NO: Tensor, u_NI: Tensor, wait: bool = False) -> None:
        """+= Fᵀ U; with ``wait``, together with the next, which the caller promises to follow.

        One product over the tokens of several saves reading and writing the sum, and costs a copy
        of the tokens: it is taken where they are fewer than a weight of [O, I] is worth.
        """
        self._waiting.append((f_NO, u_NI))
        if not wait:
            self._add_waiting()

    def _add_waiting(self) -> None:
        products, self._waiting = self._waiting, []
        tokens = sum(len(u_NI) for _, u_NI in products)
        outputs, inputs = products[0][0].shape[1], products[0][1].shape[1]
        if len(products) > 1 and tokens * (inputs + outputs) < inputs * outputs:
            f, u = zip(*products, strict=True)
            products = [(torch.cat(f), torch.cat(u))]
        for f_NO, u_NI in products:
            left, right = (u_NI, f_NO) if self._transposed else (f_NO, u_NI)
            if self._sum is None and self._in_place() is None:
                self._sum = (left.T @ right).to(self._dtype)
            else:
                _add_product_(self._buffer(), left.T, right)

    def add_product_to_rows(self, start: int, stop: int, f_Nv: Tensor, u_NI: Tensor) -> None:
        """The rows [start, stop) += Fᵀ U."""
        _add_product_(self._buffer()[start:stop], f_Nv.T, u_NI)

    def add_rows(self, index_N: Tensor, rows_NI: Tensor) -> None:
        """Adds a row for every index."""
        self._buffer().index_add_(0, index_N, rows_NI.to(self._dtype))

    def add(self, value: Tensor) -> None:
        self._buffer().add_(value)

    def release(self) -> None:
        """Drops what waits, after an error."""
        self._waiting.clear()

    def take(self) -> Tensor | None:
        """What autograd still has to add to ``.grad``: None if it is there already."""
        if self._waiting:
            self._add_waiting()
        return self.so_far()

    def so_far(self) -> Tensor | None:
        """The sum of what does not wait, which is cleared; None if nothing was added beside
        ``.grad``.
        """
        total, self._sum = self._sum, None
        return total

    def _in_place(self) -> Tensor | None:
        """The ``.grad`` to add to; None if autograd has to see the sum, to run a hook on it."""
        parameter = self._parameter
        hooks = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
        return None if hooks or not parameter.is_leaf else parameter.grad

    def _buffer(self) -> Tensor:
        in_place = self._in_place()
        if in_place is not None:
            return in_place
        if self._sum is None:
            self._sum = torch.zeros_like(self._parameter, dtype=self._dtype)
        return self._sum


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif sums_wide(total):
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.add_(left @ right)


def sums_wide(total: Tensor) -> bool:
    """Whether a product of half precision can be summed in fp32 inside, as cuBLAS can: no
    temporary, and less rounding.
    """
    wide = total.is_cuda and total.dtype == torch.float32
    return wide and hasattr(torch.ops.aten.addmm, "dtype_out")
