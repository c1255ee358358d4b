"""Graphs that autograd can differentiate twice, and those it silently cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gdprompt_fast.errors import UserError
from gdprompt_fast.models.graph import TWICE_DIFFERENTIABLE, check_twice_differentiable, nodes_of

X = torch.linspace(0.2, 0.9, 12, dtype=torch.float64).view(3, 4)
FIRST = torch.tensor([0, 2])
EYE = torch.eye(3, 4, dtype=torch.bool)


# Each proves the nodes of its graph, by name.
PROOFS: dict[str, Callable[[Tensor], Any]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Add": lambda x: x + x * x,
    "Addcdiv": lambda x: torch.addcdiv(x, x, x + 1),
    "Addcmul": lambda x: torch.addcmul(x, x, x),
    "Asin": torch.asin,
    "Atan": torch.atan,
    "Atan2": lambda x: torch.atan2(x, x * x + 1),
    "Clamp": lambda x: x.clamp(0.25, 0.8) * x,
    "ClampMax": lambda x: x.clamp_max(0.5) * x,
    "ClampMin": lambda x: x.clamp_min(0.5) * x,
    "torch::autograd::Copy": lambda x: torch.empty_like(x).copy_(x**2),
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Div": lambda x: 1 / (x + 1) + x / (x + 2),
    "Elu": lambda x: F.elu(x - 0.5),
    "Erf": torch.erf,
    "Erfc": torch.erfc,
    "Exp": torch.exp,
    "Exp2": torch.exp2,
    "Expm1": torch.expm1,
    "Gelu": F.gelu,
    "Hardswish": lambda x: F.hardswish(x) * x,
    "Hardtanh": lambda x: F.hardtanh(x, 0.25, 0.8) * x,
    "LeakyRelu": lambda x: F.leaky_relu(x - 0.5) * x,
    "Lerp": lambda x: torch.lerp(x, x * x, x),
    "Log": torch.log,
    "Log1P": torch.log1p,
    "Log2": torch.log2,
    "LogSigmoid": F.logsigmoid,
    "MaskedFill": lambda x: x.masked_fill(EYE, 0.0) ** 2,
    "Maximum": lambda x: torch.maximum(x, x * x + 0.2),
    "Minimum": lambda x: torch.minimum(x, x * x + 0.2),
    "Mish": F.mish,
    "Mul": lambda x: x * x,
    "Neg": lambda x: -(x**2),
    "Pow": lambda x: x**3,
    "Reciprocal": torch.reciprocal,
    "Relu": lambda x: F.relu(x - 0.5) * x,
    "Rsqrt": torch.rsqrt,
    "Rsub": lambda x: torch.rsub(x**2, 1.0),
    "Sigmoid": torch.sigmoid,
    "Silu": F.silu,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Sqrt": torch.sqrt,
    "Sub": lambda x: x - x * x,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Threshold": lambda x: F.threshold(x, 0.5, 0.1) * x,
    "ToCopy": lambda x: (x.to(torch.complex128) ** 2).real.to(torch.float64),
    "Where": lambda x: torch.where(EYE, x * x, x),
    "Amax": lambda x: x.amax(1) ** 2,
    "Amin": lambda x: x.amin(1) ** 2,
    "Cumsum": lambda x: x.cumsum(1) ** 2,
    "LinalgVectorNorm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "LogSoftmax": lambda x: x.log_softmax(1),
    "Logcumsumexp": lambda x: x.logcumsumexp(1),
    "Logsumexp": lambda x: x.logsumexp(1),
    "Max": lambda x: x.max(1)[0] ** 2,
    "Mean": lambda x: x.mean(1) ** 2,
    "Min": lambda x: x.min(1)[0] ** 2,
    "NativeGroupNorm": lambda x: F.group_norm(x, 2),
    "NativeLayerNorm": lambda x: F.layer_norm(x, (4,)),
    "NllLoss": lambda x: F.nll_loss(x**2, FIRST.new_tensor([0, 3, 1])),
    "NllLoss2D": lambda x: F.nll_loss((x**2)[None], FIRST.new_tensor([[0, 2, 1, 1]])),
    "Prod": lambda x: x.prod(1),
    "SafeSoftmax": lambda x: torch._safe_softmax(x, 1),
    "Softmax": lambda x: x.softmax(1),
    "Std": lambda x: x.std(1),
    "StdMean": lambda x: torch.std_mean(x, 1),
    "Sum": lambda x: x.sum(1) ** 2,
    "Var": lambda x: x.var(1),
    "VarMean": lambda x: torch.var_mean(x, 1),
    "Addbmm": lambda x: torch.addbmm(x @ x.T, x[None], x.T[None]),
    "Addmm": lambda x: torch.addmm(x @ x.T, x, x.T),
    "Addmv": lambda x: torch.addmv(x[:, 0], x, x[0]),
    "Addr": lambda x: torch.addr(x, x[:, 0], x[0]),
    "Baddbmm": lambda x: torch.baddbmm((x @ x.T)[None], x[None], x.T[None]),
    "Bmm": lambda x: x[None] @ x.T[None],
    "Dot": lambda x: torch.dot(x[0], x[1]),
    "Mm": lambda x: x @ x.T,
    "Mv": lambda x: torch.mv(x, x[0]),
    "Alias": lambda x: torch.ops.aten.alias(x) ** 2,
    "AsStrided": lambda x: x.as_strided((2, 3), (4, 1)) ** 2,
    "Cat": lambda x: torch.cat([x, x * x]),
    "Clone": lambda x: x.clone() ** 2,
    "ConstantPadNd": lambda x: F.pad(x, (1, 0)) ** 2,
    "Diagonal": lambda x: x.diagonal() ** 2,
    "Embedding": lambda x: F.embedding(FIRST, x) ** 2,
    "Expand": lambda x: x[None].expand(2, 3, 4) ** 2,
    "Flip": lambda x: x.flip(0) * x,
    "Gather": lambda x: x.gather(0, torch.zeros(1, 4, dtype=torch.long)) ** 2,
    "Index": lambda x: x[FIRST, 1:3] ** 2,
    "IndexAdd": lambda x: x.index_add(0, FIRST, x[:2]) ** 2,
    "IndexCopy": lambda x: x.index_copy(0, FIRST, x[:2] ** 2),
    "IndexFill": lambda x: x.index_fill(0, FIRST, 0.5) ** 2,
    "IndexPut": lambda x: x.index_put((FIRST,), x[:2] ** 2),
    "IndexSelect": lambda x: x.index_select(0, FIRST) ** 2,
    "MaskedScatter": lambda x: x.masked_scatter(EYE, x[0] ** 2),
    "MaskedSelect": lambda x: x.masked_select(EYE) ** 2,
    "Permute": lambda x: x.permute(1, 0) ** 2,
    "Repeat": lambda x: x.repeat(2, 1) ** 2,
    "ReshapeAlias": lambda x: torch.ops.aten._reshape_alias(x, (4, 3), (3, 1)) ** 2,
    "Roll": lambda x: x.roll(1, 0) * x,
    "Scatter": lambda x: x.scatter(0, torch.zeros(1, 4, dtype=torch.long), x[1:2] ** 2),
    "ScatterAdd": lambda x: x.scatter_add(0, torch.zeros(2, 4, dtype=torch.long), x[1:] ** 2),
    "Select": lambda x: x[1] ** 2,
    "SelectScatter": lambda x: torch.select_scatter(x, x[0] ** 2, 0, 1),
    "Slice": lambda x: x[1:] ** 2,
    "SliceScatter": lambda x: torch.slice_scatter(x, x[:1] ** 2, 0, 1, 2),
    "Sort": lambda x: x.sort(1)[0] ** 2,
    "Split": lambda x: x.split(2, 1)[0] ** 2,
    "SplitWithSizes": lambda x: x.split([1, 3], 1)[1] ** 2,
    "Squeeze": lambda x: x[None].squeeze(0) ** 2,
    "Stack": lambda x: torch.stack([x, x * x]),
    "T": lambda x: torch.ops.aten.t(x) ** 2,
    "Take": lambda x: x.take(FIRST) ** 2,
    "Topk": lambda x: x.topk(2)[0] ** 2,
    "Trace": lambda x: torch.trace(x) ** 2,
    "Transpose": lambda x: x.transpose(0, 1) ** 2,
    "Tril": lambda x: x.tril() ** 2,
    "Triu": lambda x: x.triu() ** 2,
    "Unbind": lambda x: x.unbind(0)[1] ** 2,
    "Unfold": lambda x: x.unfold(1, 2, 1) ** 2,
    "UnsafeSplit": lambda x: x.unsafe_split(2, 1)[0] ** 2,
    "UnsafeView": lambda x: torch.ops.aten._unsafe_view(x, (4, 3)) ** 2,
    "Unsqueeze": lambda x: x.unsqueeze(0) ** 2,
    "View": lambda x: x.view(4, 3) ** 2,
}


def test_every_listed_node_has_a_proof() -> None:
    assert set(PROOFS) == TWICE_DIFFERENTIABLE


@pytest.mark.parametrize("name", PROOFS)
def test_a_listed_node_is_twice_differentiable(name: str) -> None:
    x = X.clone().requires_grad_()
    outputs = PROOFS[name](x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    nodes = {node.name().rpartition("Backward")[0] for node in nodes_of(outputs)}
    assert name in nodes
    assert torch.autograd.gradcheck(PROOFS[name], (x,))
    assert torch.autograd.gradgradcheck(PROOFS[name], (x,))


class Double(torch.autograd.Function):
    """A kernel: its backward writes into a buffer, without a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return 2 * x * dy


@torch.library.custom_op("gdprompt_fast_tests::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


square.register_autograd(
    lambda ctx, dy: 2 * ctx.saved_tensors[0].detach() * dy,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize(
    ("name", "function"),
    {
        "Double": Double.apply,
        "square": square,
        "CheckpointFunction": lambda x: checkpoint(torch.sin, x, use_reentrant=True),
        "ScaledDotProduct": lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3),
        "compile": torch.compile(lambda x: x * x, backend="aot_eager"),
    }.items(),
)
def test_a_node_that_may_have_no_second_derivative_is_refused(
    name: str, function: Callable[[Tensor], Tensor]
) -> None:
    x = X.clone().requires_grad_()
    message = "expected a pass of operations known to be twice differentiable"
    with pytest.raises(UserError, match=message) as refused:
        check_twice_differentiable(function(x).sum(), "a pass")
    assert name in str(refused.value) or name == "compile"


def test_the_leaves_of_a_graph_are_returned() -> None:
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    assert check_twice_differentiable((x * y.detach() + x).sum(), "a pass") == [x]
