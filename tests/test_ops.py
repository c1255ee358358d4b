"""Every op in fp64: its values, and its first and second derivatives.

By finite differences where the op is a plain function; the ops that carry inner updates are
compared with materialised weights, whose gradient autograd takes through the inner step.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from transformers.activations import NewGELUActivation
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from gdprompt_fast.models.memory import PeakMemory
from gdprompt_fast.ops.attention import attention
from gdprompt_fast.ops.eager import attention as attention_module
from gdprompt_fast.ops.embedding import InnerEmbedding, inner_embedding
from gdprompt_fast.ops.gelu import gelu
from gdprompt_fast.ops.gradient import WeightGradient
from gdprompt_fast.ops.handle import depend_on, weight_handle
from gdprompt_fast.ops.inner_linear import inner_linear
from gdprompt_fast.ops.linear import InnerLinear
from gdprompt_fast.ops.lora import lora_materialise, lora_product
from gdprompt_fast.ops.norm import norm
from gdprompt_fast.ops.phase import Phase
from gdprompt_fast.ops.rate import Rate
from gdprompt_fast.ops.rotary import rotary
from gdprompt_fast.ops.rows import GroupedRows
from gdprompt_fast.ops.swiglu import swiglu
from gdprompt_fast.ops.vocabulary import (
    GoldTarget,
    Target,
    TeacherTarget,
    Vocabulary,
    context_loss,
    response_loss,
    tied_lookup,
)
from gdprompt_fast.ops.vocabulary import block as vocabulary_block


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def rate(groups: int) -> Rate:
    return Rate(torch.full((groups,), 0.3, dtype=torch.float64))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 7), (1, 2, 3, 4)], ids=str)
def test_norm_equals_pytorch_and_is_twice_differentiable(
    center: bool, shape: tuple[int, ...]
) -> None:
    x, weight, bias = leaf(*shape), leaf(shape[0], shape[-1]), leaf(shape[0], shape[-1])

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm(x, weight, bias, eps=1e-3, center=center)

    plain = F.layer_norm if center else F.rms_norm
    rows = (shape[0], *(1,) * (len(shape) - 2), shape[-1])
    expected = plain(x, shape[-1:], eps=1e-3) * weight.view(rows) + bias.view(rows)
    torch.testing.assert_close(op(x, weight, bias), expected)
    assert gradcheck(op, (x, weight, bias))
    assert gradgradcheck(op, (x, weight, bias))


@pytest.mark.usefixtures("on_each_backend")
def test_norm_without_bias_is_twice_differentiable() -> None:
    inputs = leaf(2, 3, 5), leaf(2, 5)
    assert gradgradcheck(lambda x, w: norm(x, w, None, eps=1e-3, center=False), inputs)


@pytest.mark.usefixtures("on_each_backend")
def test_swiglu_equals_pytorch_and_is_twice_differentiable() -> None:
    gate, up = leaf(3, 4), leaf(3, 4)
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
    assert gradcheck(swiglu, (gate, up))
    assert gradgradcheck(swiglu, (gate, up))


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_equals_pytorch_and_is_twice_differentiable(approximate: str) -> None:
    x = leaf(3, 5)

    def op(x: Tensor) -> Tensor:
        return gelu(2 * x, approximate)

    torch.testing.assert_close(op(x), F.gelu(2 * x, approximate=approximate))
    assert gradcheck(op, (x,))
    assert gradgradcheck(op, (x,))


def test_gelu_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"approximate: expected .none. or .tanh., got 'sigmoid'"):
        gelu(leaf(3), "sigmoid")


def bytes_of_two_derivatives(op: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int]:
    """What is kept between the two backward passes over x itself, and the peak."""
    with PeakMemory([x]) as memory:
        (dx,) = torch.autograd.grad(op(x).sum(), x, create_graph=True)
        kept = memory.live_bytes
        torch.autograd.grad(dx.sum(), x)
    return kept - x.nbytes, memory.peak_bytes - x.nbytes


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_takes_less_memory_than_autograd_takes(approximate: str) -> None:
    x = leaf(1000)
    kept, peak = bytes_of_two_derivatives(lambda x: gelu(x, approximate), x)
    plain = bytes_of_two_derivatives(lambda x: F.gelu(x, approximate=approximate), x)
    formula = bytes_of_two_derivatives(NewGELUActivation(), x)
    assert kept <= plain[0], f"{kept} bytes kept, {plain[0]} by PyTorch's gelu"
    assert kept <= 0.3 * formula[0], f"{kept} bytes kept, {formula[0]} by transformers' formula"
    assert peak <= 0.75 * min(plain[1], formula[1])


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("rotated", [6, 4], ids=["whole-heads", "part-of-each-head"])
@pytest.mark.parametrize("tables", [1, 2], ids=["shared-positions", "positions-of-each-row"])
def test_rotary_equals_transformers_and_is_differentiable_any_number_of_times(
    tables: int, rotated: int
) -> None:
    q, k = leaf(2, 3, 4, 6), leaf(2, 1, 4, 6)
    cos, sin = (leaf(tables, 4, rotated).detach() for _ in range(2))  # of unequal halves

    def op(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(q, k, cos, sin)

    torch.testing.assert_close(op(q, k), apply_rotary_pos_emb(q, k, cos, sin))
    assert gradcheck(op, (q, k))
    assert gradgradcheck(op, (q, k))

    def third(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        grads = sum(y.pow(4).sum() for y in function(q, k, cos, sin))
        for _ in range(2):
            grads = sum(g.sum() for g in torch.autograd.grad(grads, (q, k), create_graph=True))
        return torch.autograd.grad(grads, (q, k))

    torch.testing.assert_close(third(rotary), third(apply_rotary_pos_emb))


def test_rotary_of_tables_that_require_a_gradient_is_refused() -> None:
    x, table = leaf(1, 1, 2, 4), leaf(1, 2, 4)
    with pytest.raises(ValueError, match="cos, sin: expected constants"):
        rotary(x, x, table.detach(), table)


def packed(*rows: tuple[int, ...]) -> Tensor:
    """Segments [B, T] of the given lengths."""
    return torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows])


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize(
    ("window", "segments"),
    [(None, None), (1, None), (2, None), (None, (2, 3)), (2, (1, 4))],
    ids=["one-text", "window-1", "window-2", "packed", "packed-window-2"],
)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=lambda h: f"{h[0]}-query-{h[1]}-key-heads")
@pytest.mark.parametrize("tile", [1 << 21, 40], ids=["one-block", "many-blocks"])
def test_attention_equals_pytorch_and_is_twice_differentiable(
    window: int | None,
    segments: tuple[int, ...] | None,
    heads: tuple[int, int],
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_module, "TILE_ELEMENTS", tile)
    tokens = 5
    segment_BT = None if segments is None else packed(segments, segments[::-1])
    q, k, v = (
        leaf(2, heads[0], tokens, 3),
        leaf(2, heads[1], tokens, 3),
        leaf(2, heads[1], tokens, 3),
    )

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, scale=0.7, window=window, segment_BT=segment_BT)

    visible = torch.ones(2, 1, tokens, tokens, dtype=torch.bool).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    if segment_BT is not None:
        visible &= segment_BT[:, None, :, None] == segment_BT[:, None, None, :]
    expected = F.scaled_dot_product_attention(q, k, v, visible, scale=0.7, enable_gqa=True)
    torch.testing.assert_close(op(q, k, v), expected.transpose(1, 2))
    assert gradcheck(op, (q, k, v))
    assert gradgradcheck(op, (q, k, v))


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("window", [None, 3])
def test_packed_and_padded_texts_attend_as_each_alone(window: int | None) -> None:
    """Texts of 4 and 6 tokens between padding of large values, in value and both derivatives."""
    segment_BT = packed((3, 4, 6, 2))
    q, k, v = leaf(1, 4, 15, 3), leaf(1, 2, 15, 3), leaf(1, 2, 15, 3)
    dout, *cotangents = leaf(1, 15, 4, 3), *(torch.randn_like(t) for t in (q, k, v))
    for t in (q, k, v, dout.transpose(1, 2), *cotangents):
        t.data[:, :, :3] = t.data[:, :, 13:] = 1e3

    def both_derivatives(place: slice, segment_BT: Tensor | None) -> list[Tensor]:
        inputs = [t[:, :, place] for t in (q, k, v)]
        out = attention(*inputs, scale=0.7, window=window, segment_BT=segment_BT)
        do = dout[:, place]
        first = torch.autograd.grad(out, inputs, do, create_graph=True)
        second = torch.autograd.grad(
            first, (do, *inputs), [t[:, :, place] for t in cotangents], retain_graph=True
        )
        return [out.transpose(1, 2), *first, second[0].transpose(1, 2), *second[1:]]

    together = both_derivatives(slice(0, 15), segment_BT)
    for place in (slice(3, 7), slice(7, 13)):
        for value, alone in zip(together, both_derivatives(place, None), strict=True):
            torch.testing.assert_close(value[:, :, place], alone)


def test_attention_keeps_beside_its_inputs_only_the_output_and_a_number_per_query() -> None:
    inputs = [leaf(1, 2, 64, 4) for _ in range(3)]
    with PeakMemory(inputs) as memory:
        before = memory.live_bytes
        out = attention(*inputs, scale=0.5)
        assert memory.live_bytes - before == (out.numel() + 2 * 64) * 8


def test_attention_keeps_no_square_buffer_and_its_passes_stay_below_the_tile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tile, tokens = 1 << 14, 128
    monkeypatch.setattr(attention_module, "TILE_ELEMENTS", tile)
    largest = 0

    def watch(tensor: Tensor) -> None:
        nonlocal largest
        largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())

    inputs = [leaf(1, 2, tokens, 4) for _ in range(3)]
    with PeakMemory(inputs, on_new=watch) as memory:
        out = attention(*inputs, scale=0.5)
        grads = torch.autograd.grad(out.pow(2).sum(), inputs, create_graph=True)
        after_backward = memory.live_bytes
        sum(g.pow(2).sum() for g in grads).backward()
    assert largest <= tile, f"a buffer of {largest} elements, more than the tile's {tile}"
    one = inputs[0].numel() * 8
    assert after_backward < 16 * one < tokens * tokens * 2 * 8 * 16


@pytest.mark.parametrize("op", ["norm", "swiglu", "gelu", "attention"])
def test_third_derivatives_raise(op: str) -> None:
    ops: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "norm": (
            lambda x, w: norm(x, w, None, eps=1e-3, center=False),
            [leaf(2, 3, 4), leaf(2, 4)],
        ),
        "swiglu": (swiglu, [leaf(3, 4), leaf(3, 4)]),
        "gelu": (gelu, [leaf(3, 4)]),
        "attention": (
            lambda q, k, v: attention(q, k, v, scale=1.0),
            [leaf(1, 1, 3, 2) for _ in range(3)],
        ),
    }
    function, inputs = ops[op]
    first = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op} is differentiable twice only"):
        torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs, create_graph=True)


def inner_linear_twice(
    x_context: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_query: Tensor,
    groups: list[Tensor],
    steps: int,
) -> Tensor:
    """Inner steps of a nonlinear loss at one linear layer, then a query at the weights they
    make.
    """
    contexts, queries = (GroupedRows(group, 3) for group in groups)
    phase = Phase(second_order=True)
    weight_gradient, bias_gradient = WeightGradient(weight), WeightGradient(bias)
    layer = InnerLinear(
        weight.detach(),
        bias.detach(),
        inner_weight=True,
        inner_bias=True,
        rate=rate(3),
        phase=phase,
        weight_gradient=weight_gradient,
        bias_gradient=bias_gradient,
    )
    handle = weight_handle((weight, weight_gradient), (bias, bias_gradient))
    for level in range(steps):
        y = inner_linear(x_context, handle, layer, contexts, level)
        with phase.inner():
            (gradient,) = torch.autograd.grad(y.sin().sum(), handle, create_graph=True)
        handle = depend_on(handle, gradient)
    return inner_linear(x_query, handle, layer, queries, steps)


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


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("tokens", [(2, 3), (9, 7)], ids=["few-tokens", "many-tokens"])
@pytest.mark.parametrize(
    "groups",
    [([0, 1, 2], [0, 1, 2]), ([2, 0, 0, 1], [1, 1, 0, 2, 1]), ([0, 1, 2], [2])],
    ids=["one-each", "ragged", "groups-without-queries"],
)
def test_inner_linear_equals_materialised_weights_and_its_double_backward_is_right(
    groups: tuple[list[int], list[int]], tokens: tuple[int, int], steps: int
) -> None:
    group = [torch.tensor(g) for g in groups]
    inputs = (
        leaf(len(groups[0]), tokens[0], 3),
        leaf(4, 3),
        leaf(4),
        leaf(len(groups[1]), tokens[1], 3),
    )
    assert_same_value_and_gradients(
        lambda *x: inner_linear_twice(*x, group, steps),
        lambda *x: materialised_linear(*x, group, steps),
        inputs,
    )


@pytest.mark.parametrize("tokens", [4, 64], ids=["few-tokens", "many-tokens"])
def test_the_update_is_applied_in_the_order_of_the_fewest_products(tokens: int) -> None:
    groups, inputs, outputs = 3, 16, 24
    layer = InnerLinear(
        torch.randn(outputs, inputs),
        None,
        inner_weight=True,
        inner_bias=False,
        rate=rate(groups),
        phase=Phase(second_order=True),
        weight_gradient=None,
        bias_gradient=None,
    )
    rows = GroupedRows(torch.arange(groups), groups)
    x = torch.randn(groups, tokens, inputs)
    layer.record(x, torch.randn(groups, tokens, outputs), level=0)
    shapes = set()
    with PeakMemory([x, layer.weight_OI], on_new=lambda t: shapes.add(tuple(t.shape))):
        layer.product(x, rows, level=1)
    through_tokens, through_weight = (groups, tokens, tokens), (inputs, outputs)
    few = tokens * (inputs + outputs) < 2 * inputs * outputs
    assert (through_tokens in shapes, through_weight in shapes) == (few, not few)
    assert (groups, *through_weight) not in shapes, "the updates of several groups at once"


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


RAGGED = GroupedRows(torch.tensor([2, 0, 2, 2]), 3)  # group 1 has no rows


@pytest.mark.parametrize("shape", [(3, 5, 1), (1, 1, 4), (2, 3, 3)], ids=str)
def test_lora_product_equals_pytorch_and_is_twice_differentiable(shape: tuple[int, ...]) -> None:
    tokens, inputs, outputs = shape
    x, own, weight = leaf(4, tokens, inputs), leaf(3, outputs, inputs), leaf(outputs, inputs)

    def op(x: Tensor, own: Tensor) -> Tensor:
        return lora_product(x, weight.detach(), own, RAGGED)

    expected = torch.einsum("bti,boi->bto", x, own[RAGGED.group_B])
    torch.testing.assert_close(op(x, own), expected)
    assert gradcheck(op, (x, own))
    assert gradgradcheck(op, (x, own))


@pytest.mark.parametrize("shape", [(3, 5, 1), (1, 1, 4), (2, 3, 3)], ids=str)
def test_lora_materialise_equals_pytorch_and_is_twice_differentiable(
    shape: tuple[int, ...],
) -> None:
    tokens, inputs, outputs = shape
    own, e, x = leaf(3, outputs, inputs), leaf(4, tokens, outputs), leaf(4, tokens, inputs)

    def op(own: Tensor | None, e: Tensor, x: Tensor) -> Tensor:
        return lora_materialise(own, e, x, RAGGED, -0.3)

    by_row = torch.einsum("bto,bti->boi", e, x)
    change = -0.3 * torch.zeros_like(own).index_add(0, RAGGED.group_B, by_row)
    torch.testing.assert_close(op(own, e, x), own + change)
    torch.testing.assert_close(op(None, e, x), change)
    assert gradcheck(op, (own, e, x))
    assert gradgradcheck(op, (own, e, x))
    assert gradgradcheck(lambda e, x: op(None, e, x), (e, x))


def inner_lora_twice(
    x_context: Tensor, weight: Tensor, x_query: Tensor, groups: list[Tensor], steps: int
) -> Tensor:
    """Inner steps of a nonlinear loss at one low-rank weight, then a query at the weights they
    make.
    """
    contexts, queries = (GroupedRows(group, 3) for group in groups)
    own = weight.expand(3, *weight.shape)
    for level in range(steps):
        y = lora_product(x_context, weight.detach(), own, contexts, level)
        (gradient,) = torch.autograd.grad(y.sin().sum(), own, create_graph=True)
        own = rate(3).step(own, gradient)
    return lora_product(x_query, weight.detach(), own, queries, steps)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("outputs", [1, 4], ids=["to-the-rank", "from-the-rank"])
@pytest.mark.parametrize(
    "groups",
    [([0, 1, 2], [0, 1, 2]), ([2, 0, 0, 1], [1, 1, 0, 2, 1]), ([0, 1, 2], [2])],
    ids=["one-each", "ragged", "groups-without-queries"],
)
def test_inner_lora_equals_materialised_weights_and_its_double_backward_is_right(
    groups: tuple[list[int], list[int]], outputs: int, steps: int
) -> None:
    group = [torch.tensor(g) for g in groups]
    inputs = leaf(len(groups[0]), 2, 3), leaf(outputs, 3), leaf(len(groups[1]), 3, 3)
    assert_same_value_and_gradients(
        lambda *x: inner_lora_twice(*x, group, steps),
        lambda x, w, q: materialised_linear(x, w, None, q, group, steps),
        inputs,
    )


def test_inner_lora_is_differentiable_again_after_two_inner_steps() -> None:
    group = [torch.tensor([1, 0, 1]), torch.tensor([0, 1])]
    inputs = leaf(3, 2, 2), leaf(1, 2), leaf(2, 1, 2)
    assert gradgradcheck(lambda *x: inner_lora_twice(*x, group, 2), inputs)


def inner_embedding_once(table: Tensor, ids: list[Tensor], groups: list[Tensor]) -> Tensor:
    contexts, queries = (GroupedRows(group, 2) for group in groups)
    phase, gradient = Phase(second_order=True), WeightGradient(table)
    layer = InnerEmbedding(
        table.detach(), padding_idx=0, inner=True, rate=rate(2), phase=phase, gradient=gradient
    )
    handle = weight_handle((table, gradient))
    y = inner_embedding(ids[0], handle, layer, contexts, 0)
    with phase.inner():
        (step,) = torch.autograd.grad(y.sin().sum(), handle, create_graph=True)
    return inner_embedding(ids[1], depend_on(handle, step), layer, queries, 1)


def test_inner_embedding_equals_a_materialised_table_and_its_double_backward_is_right() -> None:
    ids = [torch.tensor([[1, 2, 1], [0, 3, 2]]), torch.tensor([[1, 0], [2, 3], [4, 1]])]
    groups = [torch.tensor([0, 1]), torch.tensor([1, 1, 0])]
    table = leaf(5, 3)

    def plain(table: Tensor) -> Tensor:
        rows = []
        for row, g in enumerate(groups[1]):
            loss = F.embedding(ids[0][groups[0] == g], table, padding_idx=0).sin().sum()
            (step,) = torch.autograd.grad(loss, table, create_graph=True)
            rows.append(F.embedding(ids[1][row], table - 0.3 * step, padding_idx=0))
        return torch.stack(rows)

    assert_same_value_and_gradients(
        lambda table: inner_embedding_once(table, ids, groups), plain, (table,)
    )


def test_a_use_outside_an_inner_step_raises_under_create_graph() -> None:
    weight, x = leaf(4, 3), leaf(1, 2, 3)
    gradient = WeightGradient(weight)
    layer = InnerLinear(
        weight.detach(),
        None,
        inner_weight=True,
        inner_bias=False,
        rate=rate(1),
        phase=Phase(second_order=True),
        weight_gradient=gradient,
        bias_gradient=None,
    )
    y = inner_linear(
        x, weight_handle((weight, gradient)), layer, GroupedRows(torch.tensor([0]), 1), 0
    )
    with pytest.raises(
        RuntimeError, match="inner_linear is differentiable once outside an inner step only"
    ):
        torch.autograd.grad(y.sum(), x, create_graph=True)


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
        return torch.tanh(F.one_hot(tokens, len(table)).to(mix) @ torch.ones_like(table) + mix[0])

    weight = torch.full_like(ids[0], 1, dtype=table.dtype) / (ids[0].shape[1] - 1)
    weight[:, -1] = 0  # the last position predicts nothing
    loss = context_loss(states(ids[0], handle, contexts, 0), weight, handle, vocabulary, 0)
    with phase.inner():
        (step,) = torch.autograd.grad(loss.sum(), handle, create_graph=True)
    handle = depend_on(handle, step)
    h_RD = states(ids[1], handle, queries, 1)[:, -1]
    target: Target = GoldTarget(queries.to_groups(ids[1][:, 0]))
    if teacher_RV is not None:
        target = TeacherTarget(queries.to_groups(teacher_RV), None, None)
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
        return torch.tanh(F.one_hot(tokens, len(table)).to(mix) @ torch.ones_like(table) + mix[0])

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


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("objective", ["gold", "teacher"])
@pytest.mark.parametrize("tied", [False, True], ids=["head-alone", "tied"])
@pytest.mark.parametrize("tile", [1 << 21, 8], ids=["one-block", "many-blocks"])
def test_the_losses_at_an_inner_updated_head_and_their_double_backward_are_right(
    tile: int, tied: bool, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_block, "TILE_ELEMENTS", tile)
    ids = [torch.tensor([[1, 2, 1], [0, 3, 2]]), torch.tensor([[1, 0], [2, 3], [4, 1]])]
    groups = [torch.tensor([0, 1]), torch.tensor([1, 1, 0])]
    teacher = leaf(3, 7).detach() if objective == "teacher" else None
    assert_same_value_and_gradients(
        lambda table, mix: vocabulary_twice(table, mix, ids, groups, tied, teacher),
        lambda table, mix: vocabulary_materialised(table, mix, ids, groups, tied, teacher),
        (leaf(7, 3), leaf(3, 3)),
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["weight-OI", "weight-IO"])
@pytest.mark.parametrize(("tokens", "products"), [(3, 1), (30, 2)], ids=["few", "many"])
def test_a_waiting_product_joins_the_next_where_the_tokens_are_few(
    tokens: int, products: int, transposed: bool
) -> None:
    f, u = torch.randn(2, tokens, 20), torch.randn(2, tokens, 30)
    weight = torch.zeros(30, 20) if transposed else torch.zeros(20, 30)
    weight.grad = torch.ones_like(weight)
    gradient = WeightGradient(weight, transposed)
    with torch.profiler.profile() as profile:
        gradient.add_product(f[0], u[0], wait=True)
        gradient.add_product(f[1], u[1])
    assert gradient.take() is None
    expected = torch.einsum("kno,kni->oi", f, u)
    torch.testing.assert_close(weight.grad, 1 + (expected.T if transposed else expected))
    assert sum(event.name == "aten::addmm_" for event in profile.events()) == products


def test_a_product_that_waits_is_not_lost_at_the_end() -> None:
    weight, f, u = torch.zeros(4, 5), torch.randn(2, 4), torch.randn(2, 5)
    gradient = WeightGradient(weight)
    gradient.add_product(f, u, wait=True)
    torch.testing.assert_close(gradient.take(), f.T @ u)
