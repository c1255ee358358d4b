"""Attention in fp64: values, derivatives by finite differences, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from gdprompt_fast.models.memory import PeakMemory
from gdprompt_fast.ops.attention import attention
from gdprompt_fast.ops.eager import attention as attention_module
from helpers.materialised import (
    leaf,
)

pytestmark = pytest.mark.quick


def packed(*rows: tuple[int, ...]) -> Tensor:
    """Segments [B, T] of the given lengths."""
    return torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows])


each_mask = pytest.mark.parametrize(
    ("window", "segments"),
    [(None, None), (1, None), (2, None), (None, (2, 3)), (2, (1, 4))],
    ids=["one-text", "window-1", "window-2", "packed", "packed-window-2"],
)
each_heads = pytest.mark.parametrize(
    "heads", [(4, 2), (3, 1)], ids=lambda h: f"{h[0]}-query-{h[1]}-key-heads"
)
TOKENS = 5


def inputs(heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of two texts."""
    query_heads, key_heads = heads
    return (
        leaf(2, query_heads, TOKENS, 3),
        leaf(2, key_heads, TOKENS, 3),
        leaf(2, key_heads, TOKENS, 3),
    )


def segments_of(segments: tuple[int, ...] | None) -> Tensor | None:
    return None if segments is None else packed(segments, segments[::-1])


@pytest.mark.usefixtures("on_each_backend")
@each_mask
@each_heads
def test_attention_equals_pytorch_and_is_twice_differentiable(
    window: int | None, segments: tuple[int, ...] | None, heads: tuple[int, int]
) -> None:
    q, k, v = inputs(heads)
    segment_BT = segments_of(segments)

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, scale=0.7, window=window, segment_BT=segment_BT)

    visible = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    if segment_BT is not None:
        visible &= segment_BT[:, None, :, None] == segment_BT[:, None, None, :]
    expected = F.scaled_dot_product_attention(q, k, v, visible, scale=0.7, enable_gqa=True)
    torch.testing.assert_close(op(q, k, v), expected.transpose(1, 2))
    assert gradcheck(op, (q, k, v))
    assert gradgradcheck(op, (q, k, v))


@pytest.mark.usefixtures("on_each_backend")
@each_mask
@each_heads
def test_attention_in_many_blocks_is_that_in_one(
    window: int | None,
    segments: tuple[int, ...] | None,
    heads: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In value and both derivatives; those in one block are checked by finite differences."""
    qkv, out_cot = inputs(heads), leaf(2, TOKENS, heads[0], 3)
    second_cots = [torch.randn_like(t) for t in qkv]

    def derivatives() -> list[Tensor]:
        out = attention(*qkv, scale=0.7, window=window, segment_BT=segments_of(segments))
        first = torch.autograd.grad(out, qkv, out_cot, create_graph=True)
        return [out, *first, *torch.autograd.grad(first, (*qkv, out_cot), second_cots)]

    expected = derivatives()
    monkeypatch.setattr(attention_module, "TILE_ELEMENTS", 40)
    for got, want in zip(derivatives(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


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
