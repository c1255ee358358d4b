"""Whether autograd can differentiate a pass twice: every node of its graph is known to.

An autograd Function whose backward computes without a graph (a fused kernel, a ``no_grad`` inside,
a compiled region) turns second order into first order without an error. So the nodes are held
against a list; each on it is proved by ``gradgradcheck`` in the test suite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from ..errors import UserError

# Nodes of PyTorch's own, without their "Backward" and number.
_ELEMENTWISE = """
    Abs Acos Add Addcdiv Addcmul Asin Atan Atan2 Clamp ClampMax ClampMin Cos Cosh Div Elu Erf
    Erfc Exp Exp2 Expm1 Gelu Hardswish Hardtanh LeakyRelu Lerp Log Log1P Log2 LogSigmoid MaskedFill
    Maximum Minimum Mish Mul Neg Pow Reciprocal Relu Rsqrt Rsub Sigmoid Silu Sin Sinh Softplus Sqrt
    Sub Tan Tanh Threshold ToCopy Where
"""
_SUMS = """
    Amax Amin Cumsum LinalgVectorNorm LogSoftmax Logcumsumexp Logsumexp Max Mean Min
    NativeGroupNorm NativeLayerNorm NllLoss NllLoss2D Prod SafeSoftmax Softmax Std StdMean Sum Var
    VarMean
"""
_PRODUCTS = "Addbmm Addmm Addmv Addr Baddbmm Bmm Dot Mm Mv"
_PLACES = """
    torch::autograd::Copy
    Alias AsStrided Cat Clone ConstantPadNd Diagonal Embedding Expand Flip Gather Index IndexAdd
    IndexCopy IndexFill IndexPut IndexSelect MaskedScatter MaskedSelect Permute Repeat ReshapeAlias
    Roll Scatter ScatterAdd Select SelectScatter Slice SliceScatter Sort Split SplitWithSizes
    Squeeze Stack T Take Topk Trace Transpose Tril Triu Unbind Unfold UnsafeSplit UnsafeView
    Unsqueeze View
"""
TWICE_DIFFERENTIABLE = frozenset(f"{_ELEMENTWISE}{_SUMS}{_PRODUCTS}{_PLACES}".split())
_STRUCTURE = {"torch::autograd::AccumulateGrad", "torch::autograd::CopySlices"}


def nodes_of(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of the graph that computed the tensors, each once."""
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def check_twice_differentiable(loss: Tensor, what: str) -> list[Tensor]:
    """Checks the graph of a loss; returns the leaves that its gradient reaches.

    Raises:
        UserError: naming a node that may have no second derivative.
    """
    leaves = []
    for node in nodes_of([loss]):
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.append(node.variable)
        elif not _is_known(node):
            raise UserError(
                f"model: expected {what} of operations known to be twice differentiable, got "
                f"{_describe(node)}: its backward may have no graph of its own, and the "
                "meta-gradient would silently be of first order"
            )
    return leaves


def _is_known(node: Any) -> bool:
    function = getattr(type(node), "_forward_cls", None)  # of an autograd Function in Python
    if function is not None:
        return str(function.__module__).startswith("gdprompt_fast.")
    name = node.name()
    operation, backward, _ = name.rpartition("Backward")
    operation = operation if backward else name
    return name in _STRUCTURE or operation in TWICE_DIFFERENTIABLE


def _describe(node: Any) -> str:
    function = getattr(type(node), "_forward_cls", None)
    if function is None:
        return f"{node.name()}"
    return f"the autograd Function {function.__module__}.{function.__qualname__}"
