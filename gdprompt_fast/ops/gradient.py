"""Where the products of the last backward become the gradient of a shared weight."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

LAG = 0  # products that may be under way beside a captured step


class Beside:
    """Products of a captured step on a stream of their own.

    Nothing waits for a weight's gradient before the end, so what is bound by memory in the step,
    or does not fill the GPU, can run at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._under_way: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def add_product_(self, *tensors: Tensor) -> None:
        """As :func:`_add_product_`; the tensors live until the step has waited for it."""
        self._stream.wait_stream(torch.cuda.current_stream(tensors[0].device))
        with torch.cuda.stream(self._stream):
            _add_product_(*tensors)
        self._under_way.append((self._stream.record_event(), tensors))
        self.join(LAG)

    def join(self, under_way: int = 0) -> None:
        """The step waits until so many products are under way."""
        while len(self._under_way) > under_way:
            event, tensors = self._under_way.popleft()
            torch.cuda.current_stream(tensors[0].device).wait_event(event)

    def release(self) -> None:
        """Drops what is under way, after an error."""
        self._under_way.clear()


_beside: dict[torch.device, Beside] = {}


def beside(total: Tensor) -> Beside | None:
    """What a sum's products run on beside the step; None if they run in it."""
    if not (LAG and total.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    if total.device not in _beside:
        _beside[total.device] = Beside(total.device)
    return _beside[total.device]


class WeightGradient:
    """Sums Fᵀ U over all uses of one weight [O, I] without a temporary of its size per use.

    The sum goes straight into the weight's ``.grad`` where there is one, and into one buffer, which
    autograd then adopts as ``.grad``, where there is none.
    """

    def __init__(self, parameter: Tensor, transposed: bool = False) -> None:
        self._parameter = parameter
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
                self._sum = (left.T @ right).to(self._parameter.dtype)
            else:
                self._add_product(self._buffer(), left.T, right)

    def add_product_to_rows(self, start: int, stop: int, f_Nv: Tensor, u_NI: Tensor) -> None:
        """The rows [start, stop) += Fᵀ U."""
        self._add_product(self._buffer()[start:stop], f_Nv.T, u_NI)

    def add_rows(self, index_N: Tensor, rows_NI: Tensor) -> None:
        """Adds a row for every index."""
        self._join()
        self._buffer().index_add_(0, index_N, rows_NI.to(self._parameter.dtype))

    def add(self, value: Tensor) -> None:
        self._buffer().add_(value)

    def release(self) -> None:
        """Drops what waits, after an error."""
        self._waiting.clear()
        for each in _beside.values():
            each.release()

    def take(self) -> Tensor | None:
        """What autograd still has to add to ``.grad``: None if it is there already."""
        if self._waiting:
            self._add_waiting()
        self._join()
        total, self._sum = self._sum, None
        return total

    def _add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        on = beside(total)
        (_add_product_ if on is None else on.add_product_)(total, left, right)

    def _join(self) -> None:
        """Before the sum is written to, or read, in the step."""
        if (on := beside(self._parameter)) is not None:
            on.join()

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
            self._sum = torch.zeros_like(self._parameter)
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
